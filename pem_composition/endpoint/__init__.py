"""Work for a model behind an OpenAI-compatible endpoint: instructions for comments, grades."""
