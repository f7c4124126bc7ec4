"""Router-tuned models in PyTorch: what a MindSkip model is, how it is tuned and measured."""
