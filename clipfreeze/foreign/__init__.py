"""LoRA that others saved, as a plan and its tensors."""
