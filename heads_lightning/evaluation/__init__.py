"""Asking trained models: one held-out protocol for all of them, infilling, continuing, problems of others, runs side by side.

protocol        the fixed questions, and scores of answers           scoring         asks a model all that it can be asked
abilities       what follows from the objective of training          likelihood      nats of given tokens: what scores are made of
masked          models that predict hidden tokens                    span_filling    models that fill sentinels
continuation    what comes after a text                              comparison      runs in one table
problems        HumanEval-Infilling, SAFIM                           execution       runs programs with limits
lm_eval         adapter of lm-evaluation-harness
"""
