"""Changes: finders propose them, rankings order them, trials test them."""
