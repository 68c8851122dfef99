# shellcheck shell=bash
# What every process of a run wants, with the reason for each; srlm sets the same for the stages it starts
# (environment() in child_process.py). Source this before you start ranks yourself.

# Ranks share the cores; more threads than cores make every rank slower.
export OMP_NUM_THREADS=1
# The project's root holds folders named kernels and tools, which other packages would find.
export PYTHONSAFEPATH=1
# Megatron's overlap of tensor-parallel communication wants one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A stage reads local files only, and says what is worth saying itself.
export HF_HUB_OFFLINE=1
export TRANSFORMERS_VERBOSITY=error
# Tokenizers' threads and forks do not go together.
export TOKENIZERS_PARALLELISM=false

# Yours count for the rest, where you have set them.
# NCCL says something only when something is wrong.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A rank whose partner is lost ends with an error; it does not wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Batches differ in length: the allocator grows what it has and does not keep pieces nobody can use.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
