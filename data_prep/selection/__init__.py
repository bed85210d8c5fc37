"""Web images chosen for being like ImageNet, and without those that the evaluations use: docs/select.md."""
