"""What a user sees while a run goes on, on a terminal and elsewhere."""

import io
import math

import pytest
from rich.console import Console

from upslope.collect import make_environments
from upslope.recipes import load_recipe
from upslope.train import Run
from upslope.train.control import FIGURES, ControlSession
from upslope.train.problems import environments_of
from upslope.train.progress import ProgressDisplay
from upslope.train.starting_weights import Places


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pipe() -> Console:
    return Console(file=io.StringIO(), width=120)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def display_of(steps: int, title: str, console: Console, clock: Clock) -> ProgressDisplay:
    return ProgressDisplay(steps, figures=FIGURES, enabled=True, title=title, console=console, clock=clock)


METRICS = {"episode_return": 123.45, "kl": 0.0123, "entropy": 0.5, "explained_variance": 0.875, "clip_fraction": 0.05}


def test_a_pipe_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    clock, console = Clock(), pipe()
    with ProgressDisplay(
        1000, figures=FIGURES, enabled=True, title="cartpole-ppo", console=console, clock=clock
    ) as display:
        for second in range(1, 26):
            clock.now += 1
            display.update(40 * second, METRICS)
    lines = text_of(console).splitlines()
    assert [line.split(" steps (")[0] for line in lines] == [
        "cartpole-ppo: 400 of 1,000",
        "cartpole-ppo: 800 of 1,000",
        "cartpole-ppo: 1,000 of 1,000",
    ]
    assert (
        "40 steps/s  return 123.5  KL 0.0123  entropy 0.500  explained variance 0.88  10 s so far, 15 s left"
        in lines[0]
    )
    assert lines[-1].endswith("done in 25 s")


def test_the_speed_is_that_of_the_last_seconds() -> None:
    clock, console = Clock(), pipe()
    with ProgressDisplay(10**6, figures=FIGURES, enabled=True, title="t", console=console, clock=clock) as display:
        for second in range(1, 10):
            clock.now += 1
            display.update(1000 * second, {})
        for second in range(1, 11):
            clock.now += 1
            display.update(9000 + 10 * second, {})
    assert "10 steps/s" in text_of(console).splitlines()[-1]


def test_a_resumed_run_does_not_count_the_earlier_session_as_speed() -> None:
    clock, console = Clock(), pipe()
    with ProgressDisplay(200_000, figures=FIGURES, enabled=True, title="t", console=console, clock=clock) as display:
        for second in range(1, 12):
            clock.now += 1
            display.update(100_000 + 100 * second, {})
    assert " 100 steps/s" in text_of(console).splitlines()[0]


def test_a_terminal_shows_the_named_figures_and_a_dash_for_what_is_missing() -> None:
    clock, console = Clock(), terminal()
    with ProgressDisplay(
        1000, figures=FIGURES, enabled=True, title="cartpole-ppo", console=console, clock=clock
    ) as display:
        clock.now += 1
        display.update(250, {**METRICS, "explained_variance": math.nan, "steps_per_second": 5000.0})
    shown = [line.split() for line in text_of(console).splitlines()[-6:]]
    words = " ".join(word for line in shown for word in line)
    assert "25% 250 of 1,000 steps 5,000 steps/s" in words
    assert "return 123.5 length - KL 0.0123" in words
    assert "entropy 0.500 explained variance - clipped 5.0%" in words


def test_updates_in_quick_succession_draw_nothing() -> None:
    clock, console = Clock(), terminal()
    with ProgressDisplay(10**6, figures=FIGURES, enabled=True, title="t", console=console, clock=clock) as display:
        clock.now += 1
        display.update(1, METRICS)
        before = text_of(console)
        for steps in range(2, 1000):
            clock.now += 0.0001
            display.update(steps, METRICS)
        assert text_of(console) == before
        clock.now += 1
        display.update(1001, METRICS)
        assert "1,001 of" in text_of(console)[len(before) :]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    clock, console = Clock(), terminal(width)
    with ProgressDisplay(
        10**8, figures=FIGURES, enabled=True, title="bipedalwalker-ppo", console=console, clock=clock
    ) as display:
        clock.now += 1
        display.update(10**7, {**METRICS, "learning_rate": 3e-4, "value_loss": 123456.0, "policy_loss": -0.01234})
    lines = text_of(console).replace("\r", "\n").split("\n")
    control = ("\x1b[2K", "\x1b[1A", "\x1b[?25l", "\x1b[?25h")
    for line in lines:
        for code in control:
            line = line.replace(code, "")
        assert len(line) <= width


def test_messages_are_printed_as_they_are() -> None:
    console = pipe()
    with ProgressDisplay(10, figures=FIGURES, enabled=True, title="t", console=console) as display:
        display.message("saved [bold]runs/x[/bold]")
    assert text_of(console) == "saved [bold]runs/x[/bold]\n"


@pytest.mark.parametrize("console", [pipe(), terminal()])
def test_disabled_says_nothing(console: Console) -> None:
    clock = Clock()
    with ProgressDisplay(10, figures=FIGURES, enabled=False, title="t", console=console, clock=clock) as display:
        clock.now += 100
        display.update(10, METRICS)
        display.message("hello")
    assert text_of(console) == ""


def test_an_error_inside_gives_the_terminal_back() -> None:
    console = terminal()
    display = ProgressDisplay(10, figures=FIGURES, enabled=True, title="t", console=console)

    def run() -> None:
        with display:
            display.update(5, {})
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run()
    assert text_of(console).rstrip().endswith("\x1b[?25h")


@pytest.mark.parametrize(("recipe", "shown"), [("access-control-ppo", True), ("six-state-ppo", False)])
def test_the_average_reward_is_shown_where_it_is_followed(recipe: str, shown: bool) -> None:
    run = load_recipe(recipe)
    assert isinstance(run, Run)
    environments = make_environments(environments_of(run.environment, None), run.environment)
    session = ControlSession(
        run, environments, encoder=None, places=Places(start=None, reference=None, behaviour=None, potential=None)
    )
    assert ("average_reward" in session.figures.spoken) is shown
    assert ("average_reward" in [name for _, name, _ in session.figures.shown]) is shown
    session.close()
