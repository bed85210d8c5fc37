"""What feeds a rank: splits opened, the order of samples, augmentation, micro-batches."""
