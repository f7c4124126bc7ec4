"""What a server runs: continuous batching over an exported graph.

The folder is copied as it stands into a model repository and imported there as a package of
another name, without mskip. So its modules import one another by relative paths, and beside
them only the standard library, numpy, onnxruntime and tokenizers.
"""
