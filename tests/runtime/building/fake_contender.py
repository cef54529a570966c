"""A contender whose forms do as their names say. Runs as a script, in the sandbox as well, so it
imports nothing of the tests."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.building.contender import main

if TYPE_CHECKING:
    import torch

    from runtime.building.contender_messages import Make, Place
    from runtime.compiling.forms import Run
    from runtime.importing.tensor_program import TensorProgram

EAGER_SECONDS = 0.03  # how long the slow eager form sleeps: far more than a loaded machine adds


class FakeForms:
    """`fast` is the program itself; `eager` is it too, but sleeps."""

    def make(
        self,
        name: str,
        program: "TensorProgram",
        making: "Make",
        inputs: "list[list[torch.Tensor]]",
    ) -> None:
        from runtime.compiling.forms import FormFailure

        assert inputs
        assert not list(Path(making.place.directory).iterdir())
        Path(making.place.directory, "form.bin").write_bytes(b"x" * 100)
        match name:
            case "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "ends":
                os._exit(7)
            case "hangs":
                time.sleep(600)
            case "compiles":
                subprocess.run(["sleep", "86397"], check=True)
            case "greedy":
                kept = []
                while True:
                    kept.append(bytearray(2**28))
            case "refuses":
                raise FormFailure("The operator frobnicate has no counterpart.")

    def load(self, name: str, program: "TensorProgram | None", place: "Place") -> "Run":
        import torch

        from runtime.compiling.programs import load_program

        if program is None:
            program = load_program(Path(place.artifact_dir), place.manifest, place.device)
            assert Path(place.directory, "form.bin").is_file()
        num_runs = 0

        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            nonlocal num_runs
            num_runs += 1
            (logits,) = program.run(inputs)
            match name:
                case "eager" | "as_slow":
                    time.sleep(EAGER_SECONDS)
                case "drops_bias":
                    return [logits - 0.01]
                case "rounds" | "half":
                    return [logits.bfloat16().float()]
                case "lossy":
                    return [logits * 1.02]
                case "tires" if num_runs > 60:
                    os.kill(os.getpid(), signal.SIGKILL)
            return [logits]

        return run


if __name__ == "__main__":
    main(FakeForms())
