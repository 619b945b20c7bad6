"""The whole model against transformers and DeepSeek's code; FP8 weights; conversion of checkpoints."""
