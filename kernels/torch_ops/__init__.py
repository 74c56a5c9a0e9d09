"""Block-sparse kernels in torch operations, for any device."""
