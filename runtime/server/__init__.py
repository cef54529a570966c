"""A worker's side of the protocol, over one accepted stream.

`connection.py` frames and drains, `decoder.py` and `tensor.py` are what it may serve, and
`engine_thread.py` runs a decoder's steps. What a request means to a model is the engine's
(`runtime/engine/`) or the batcher's (`runtime/batching/`).
"""
