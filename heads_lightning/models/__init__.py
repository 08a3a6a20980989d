"""Models with the surface of other libraries, over the modules of this one: transformers' and TRL's classes, Megatron's T5Model.

value, value_files      language models with a value head             bigs, bigs_config   BiGS as a class of transformers
value_export            reward models, pickles of old                 reference           frozen copies
t5, t5_parallel         T5 in stages and shards                       hf_generation       transformers' `generate` over our caches
auto_classes            how AutoModel… come to know ours
"""
