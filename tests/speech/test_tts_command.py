"""Text to speech by a program: its arguments, and everything that it may do wrong."""

import shlex
import sys

import numpy as np
import pytest

from smoltolk.speech.audio import AudioError
from smoltolk.speech.tts_command import CommandSynthesizer

# A program whose audio lasts 0.1 s for each letter, and is of another pitch for another voice.
SPEAK = """
import sys, numpy, soundfile
output, voice = sys.argv[1:3]
text = sys.argv[3] if len(sys.argv) > 3 else sys.stdin.buffer.read().decode()
if "bad" in text: sys.exit("cannot say " + text)
if "nothing" in text: sys.exit(0)
if "broken" in text: open(output, "w").write("no audio"); sys.exit(0)
times = numpy.arange(1100 * len(text)) / 11000
loudness = 0 if "silent" in text else 0.3
soundfile.write(output, loudness * numpy.sin(6.28 * (200 + 100 * len(voice)) * times), 11000, format="FLAC")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "speak aloud.py"  # with a space, which quotes keep together
    path.write_text(SPEAK)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"


@pytest.mark.parametrize("arguments", ["{output} {voice} {text}", "{output} {voice}"])
def test_the_text_is_an_argument_or_comes_on_standard_input(program, arguments):
    synthesizer = CommandSynthesizer(f"{program} {arguments}")
    text = "a 'b' $(c) ü {output}; d"  # nothing of it is a quote, a command or a placeholder
    audio, sample_rate_hz = synthesizer.speak(text, "x")
    assert (audio.dtype, audio.shape, sample_rate_hz) == (np.float32, (1100 * len(text),), 11000)
    assert not np.array_equal(audio, synthesizer.speak(text, "xyz")[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bad", "failed with status 1: cannot say bad"),
        ("nothing", r"ended well, but wrote no file to \{output\}"),
        ("broken", "wrote audio that cannot be decoded"),
        ("silent", "wrote audio that is silent"),
    ],
)
def test_what_goes_wrong_is_said(program, text, message):
    with pytest.raises(AudioError, match=message):
        CommandSynthesizer(f"{program} {{output}} x {{text}}").speak(text)


def test_a_program_that_hangs_is_stopped():
    command = f"{shlex.quote(sys.executable)} -c 'import time; time.sleep(60)' {{output}}"
    with pytest.raises(AudioError, match=r"was stopped after 0\.2 s"):
        CommandSynthesizer(command, timeout_s=0.2).speak("a")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("say 'a {output}", "cannot be split into arguments"),
        ("say {text}", r"has no \{output\}"),
        ("no-such-program {output}", "no-such-program is no program that can be run"),
        ("", r"has no \{output\}"),
    ],
)
def test_commands_that_cannot_work_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        CommandSynthesizer(command)
