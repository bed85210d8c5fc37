"""What the paper does with a trained model: one file an evaluation."""
