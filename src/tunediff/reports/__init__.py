"""Reports: a finding as a page, as charts, and in a terminal."""
