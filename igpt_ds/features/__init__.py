"""What evaluations are made of: a network's features, the splits that they are of, and linear classifiers."""
