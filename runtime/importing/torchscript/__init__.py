"""TorchScript: modules that `torch.jit.save` wrote, whose inputs have names but no shapes.

Loading and running one is running its code: only in a sandboxed build or worker.
"""
