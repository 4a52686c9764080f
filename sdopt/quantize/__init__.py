"""Scales of layers' inputs, through nvidia-modelopt, weights in INT8, FP8 and INT4. Knows no graph and no bundle."""
