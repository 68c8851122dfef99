# shellcheck shell=bash
# Variables that every process of a run needs, each with its reason; srlm sets the same for the stages it starts
# (environment() in child_process.py). Source this file before you start ranks yourself. A process that samples is
# not given those marked (training), unless you gave them another value (sampler_variables() in sampler_environment.py).

# Ranks share the cores; more threads than cores make every rank slower. srlm run divides the cores among its
# processes, and lets an engine on GPUs choose for itself.
export OMP_NUM_THREADS=1
# The project's root holds folders named kernels and tools, which other packages would import.
export PYTHONSAFEPATH=1
# (training) Megatron's overlap of tensor-parallel communication wants one queue. An engine's copies would wait in it.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A stage reads local files only, and prints what matters itself.
export HF_HUB_OFFLINE=1
export TRANSFORMERS_VERBOSITY=error
# Tokenizers' threads and forked processes do not work together.
export TOKENIZERS_PARALLELISM=false

# Values that you have set count for the rest.
# Compiled kernels and other files for a while are on the node's own disk: many ranks that compile into one shared home
# lose files to each other.
scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
export TMPDIR="${TMPDIR:-$scratch}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/srlm-$UID/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/srlm-$UID/inductor}"
unset scratch
# A waiting thread sleeps: where cores are shared, spinning takes the one that the other thread needs.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# NCCL prints only when something is wrong.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# (training) A rank whose partner is lost ends with an error and does not wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# (training) Batches differ in length: the allocator extends its segments and keeps no pieces that are too small to use.
# Memory in such segments cannot be shared with other processes, as engines do where they split a model. The second name
# is that of torch before 2.9.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-$PYTORCH_ALLOC_CONF}"
