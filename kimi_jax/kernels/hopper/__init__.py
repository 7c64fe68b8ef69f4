"""What the Mosaic GPU kernels for Hopper are made of.

`program`: a kernel has `COMPUTE` warpgroups that calculate and one that copies. `ring`: that one
fills a ring of blocks in shared memory with the tensor memory accelerator; `full` tells when a slot
holds its block, `empty` when all that calculate are done with it. `sums`: products that start from
a value. `softmax`: of attention. `products`: programs that stay on their multiprocessor and take
one tile of a product after another; `int4_products` and `int4_few_rows`: those with matrices of
four bits.

Interpreted on a CPU the same barriers, copies, loops and masks run; only products of `sums` are
then JAX's own, since JAX 0.12's interpreter has neither products from registers nor accumulators
that start from a value. Each interpreted warpgroup blocks a thread of JAX's CPU client, which has
as many as cores or simulated devices: with fewer than about eight the interpreter can wait for
ever.
"""
