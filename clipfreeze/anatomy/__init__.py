"""What a model is made of: every parameter in exactly one part. Nothing else asks which architecture a model is."""
