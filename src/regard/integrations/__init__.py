"""regard inside other libraries' models: transformers, timm and torch.nn. Each is imported where it is used."""
