"""A training: checked, begun or resumed, the one loop, ended; and searches of many trainings."""
