"""A course: build LoRA yourself in twelve steps, each step checked. Start with README.md."""
