"""One folder per array operation; kernels know arrays only."""
