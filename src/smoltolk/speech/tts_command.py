"""Text to speech by a program of one's own, which is run once for each text."""

import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from smoltolk.speech.audio import AudioError, load_native_audio

_TIMEOUT_S = 600.0
_SHOWN_CHARACTERS = 500  # of what a program says about its failure
_PLACEHOLDERS = re.compile(r"\{(text|output|voice)\}")


class CommandSynthesizer:
    """A program that writes the speech of a text to an audio file.

    It is run without a shell: each argument stays one argument, whatever is in the text.

    Args:
        command: the program and its arguments, quoted as for a shell. In them `{output}` stands for the audio file to
            write (in any format that `load_audio` knows), `{text}` for the text, `{voice}` for the voice. Without
            `{text}` the text comes on standard input, as UTF-8.
        timeout_s: how long the program may take for a text.

    Raises:
        ValueError: the command cannot be split, has no `{output}`, or its program is not there.
    """

    def __init__(self, command: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"tts {command!r} cannot be split into arguments ({error}): correct its quotes") from None
        found = set(_PLACEHOLDERS.findall(" ".join(self._arguments)))
        if "output" not in found:
            raise ValueError(f"tts {command!r} has no {{output}}: say where the program gets the file to write")
        if shutil.which(self._arguments[0]) is None:
            raise ValueError(f"tts {command!r}: {self._arguments[0]} is no program that can be run; correct its path")
        self.takes_voice = "voice" in found
        self._takes_text = "text" in found
        self._timeout_s = timeout_s

    def speak(self, text: str, voice: str | None = None) -> tuple[np.ndarray, int]:
        """Speaks a text.

        Args:
            text: the text.
            voice: what `{voice}` stands for.

        Returns:
            Waveform of one channel in −1 … 1, float32 (samples,), and its sampling rate in Hz.

        Raises:
            AudioError: the program fails, takes too long, or writes no audio that can be used.
            OSError: the program cannot be started.
        """
        with tempfile.TemporaryDirectory(prefix="smoltolk-tts-") as folder:
            output = Path(folder) / "speech.wav"
            values = {"text": text, "output": str(output), "voice": voice or ""}
            arguments = [_PLACEHOLDERS.sub(lambda found: values[found[1]], given) for given in self._arguments]
            try:
                run = subprocess.run(  # noqa: S603, the user's own program
                    arguments,
                    input=b"" if self._takes_text else text.encode(),
                    capture_output=True,
                    timeout=self._timeout_s,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise AudioError(f"{arguments[0]} was stopped after {self._timeout_s:g} s") from None
            if run.returncode:
                said = run.stderr.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
                raise AudioError(f"{arguments[0]} failed with status {run.returncode}: {said or 'it said nothing'}")
            if not output.is_file():
                raise AudioError(f"{arguments[0]} ended well, but wrote no file to {{output}}")
            try:
                return load_native_audio(output)
            except AudioError as error:
                raise AudioError(f"{arguments[0]} wrote {str(error).replace(str(output), 'audio that')}") from None
