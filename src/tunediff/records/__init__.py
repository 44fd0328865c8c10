"""Records: the types that pass between the parts, saved and loaded."""
