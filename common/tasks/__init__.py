"""What images are good for: one module per cited paper, each with its flags, its declared choices and one `compress`."""
