"""Models: where their parts are, how they come from files and go back into them, and what changes them."""
