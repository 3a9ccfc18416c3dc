"""Numbers of a run by step: history, TensorBoard, Weights & Biases."""
