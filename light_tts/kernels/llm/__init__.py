"""Kernels of the language model, over tokens.

Weights are laid out as in nn.Linear: (outputs, inputs). Linears with the same input are stacked along the
outputs, and the weight of an RMS norm is folded into the linear after it (`small_linear.fold_rms_norm`)."""
