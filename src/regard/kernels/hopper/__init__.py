"""Block-sparse attention for Hopper GPUs in Gluon: tensor memory copies, asynchronous products, specialised warps."""
