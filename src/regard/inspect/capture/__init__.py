"""How attention layers are watched while their model runs, one file for each kind of model."""
