"""The Attention tab of TensorBoard.

TensorBoard loads this at every start: no torch, and no exception may leave it.
"""
