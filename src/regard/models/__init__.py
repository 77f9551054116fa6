"""Small host models that a mechanism is put into, and how they are saved."""
