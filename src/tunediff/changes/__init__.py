"""Changes: who proposes them, what ranks them, what tries them."""
