"""What happens around a step of training, each in a file of its own.

    trainer.py      Lightning's trainer from TrainerConfig          callbacks.py      progress, metrics, samples
    optimizers.py   parameter groups, Muon beside AdamW             averaging.py      moving average of weights
    parallel.py     FSDP2, HSDP and tensor parallelism              tensor_parallel.py   how a matrix is shared out
    saving.py       when a checkpoint is written, and which stay    checkpoints.py    its contents; distributed_checkpoints.py in shares
    agreement.py    what ranks must agree on before they train      attempts.py       a run that was preempted goes on in its folder
    blocks.py       recomputing and compiling blocks                spikes.py, profiling.py, run_logger.py

The step itself is `heads_lightning/module.py`; the record of a run is `heads_lightning/tracking`.
"""
