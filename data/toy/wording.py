"""How the toy world words what the agent asks of a model that was trained on it (config.json: "wording": "toy").

mcr_agent.py loads this file for such a model; for any other it quotes the question, and asks for a description. A data
set of your own may have such a file: CAPTION and claim(question, answer, thought), with the wording of its rows."""
import re

CAPTION = "Describe {t} seconds."                    # asked of a clip; {t}: its middle
MOMENT = re.compile(r"(What colour|Which shape|Which way|What) (?:is|does) .*at (\d+) seconds\?")


def claim(question, answer, thought):
    """The statement that a second look checks, as data/toy/prepare.py writes claims. About one moment it names the
    object that the agent says it saw; None: no question of the toy world, the caller quotes it."""
    asked = MOMENT.fullmatch(question)
    if not asked:
        return None
    asks, seconds = asked.groups()
    # What the agent saw there, in the world's words: "red circle moving left on grey."
    saw = re.match(r"(\w+) (\w+) moving ", thought)
    colour, shape = saw.groups() if saw else ("", "shape")
    thing = answer
    if asks == "What colour":
        thing = f"{answer} {shape}"
    elif asks == "Which shape":
        thing = f"{colour} {answer.removeprefix('a ')}"
    elif asks == "Which way":
        thing = f"{colour} {shape} moving {answer}"
    return f"at {seconds} seconds there is a {thing.strip()}."
