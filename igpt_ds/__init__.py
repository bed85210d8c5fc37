"""Image GPT at full scale: training and evaluation of "Generative Pretraining from Pixels" (Chen et al. 2020)."""

__version__ = "0.1.0"
