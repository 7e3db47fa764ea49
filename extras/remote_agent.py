"""The agent with any model behind an OpenAI-compatible URL in our model's place.

    python extras/remote_agent.py video.mp4 "What happens?" --url http://localhost:8000/v1 --api-model NAME

Frames and questions are sent there, with the key in the variable MCR_API_KEY if it is set. All flags of
mcr_agent.py's rollout work; --trace writes the same trace.

Differs from our own model (mcr_agent.LiveModel), because an API can do less:
  1. A request holds the whole context: only the server can keep a prefix in its cache.
  2. A turn cannot be opened for the model: the route is told in the trace and opens nothing.
  3. Choices (routes, verdicts) are asked for in words, not scored; an answer's probability is unknown.
  4. Tool calls are text of our format, described in the system prompt. Frames travel as PNG data URLs, each
     behind its time. Tokens are estimates.
"""
import base64
import http.client
import json
import math
import os
import re
import sys
import urllib.request
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from iv3 import load_file, read_video, run_cli
from m2la import need
from mcr_agent import FORCED, ModelFailed, ask_about, check_args, parser_of, window_of, within

png = load_file("extras/report.py").png      # as the pages write frames
LETTERS_PER_TOKEN = 4                        # of English text, about
IMAGE_TOKENS = 256                           # of a frame, about: servers differ
IMAGE_SIDE = 1024                            # pixels of a frame's longer side, at most: a request holds many
CHOICE_TOKENS = 16                           # of a reply that names a choice
LETTERS_KEPT = 16                            # for each token asked for: a server may ignore max_tokens
REPLY_BYTES = 2 ** 22                        # of a reply that is read at all
NOT_NAMED = -9.0                             # log-probability of a choice that the model did not name

# No connection, a reply that is none, or JSON of another form.
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """Nowhere: the user named one host; frames and the key go to no other."""


class Message(NamedTuple):
    """A message in the API's form, and the tokens that it is estimated to take."""
    turn: dict
    tokens: int


# --------------------------------------------------------------------------------------------------- messages
def text_part(text):
    return {"type": "text", "text": text}


def frame_parts(item):
    """A video item → its frames as images, each behind its time."""
    video = read_video(item["video"], **window_of(item))
    parts = []
    for t, frame in zip(video.times, video.frames):
        data = base64.b64encode(png(frame, IMAGE_SIDE)).decode()
        parts.append(text_part(f"<{t:.1f} seconds>"))
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return parts


def convert(message):
    """A message of the agent → Message. Tool text is quoted in a user turn, as in Qwen's chat template."""
    role = message["role"]
    content = message["content"]
    if isinstance(content, str):
        content = [text_part(content)]
    parts = []
    for item in content:
        if item["type"] != "text":
            parts += frame_parts(item)
        elif role == "tool":
            parts.append(text_part(f"<tool_response>\n{item['text']}\n</tool_response>"))
        else:
            parts.append(text_part(item["text"]))
    tokens = 0
    for part in parts:
        if part["type"] == "text":
            tokens += len(part["text"]) // LETTERS_PER_TOKEN + 1
        else:
            tokens += IMAGE_TOKENS
    return Message({"role": "user" if role == "tool" else role, "content": parts}, tokens)


def joined(turns):
    """Turns of one role in a row as one: some servers want no two user turns in a row. What is not the user's
    is text alone, and sent as such."""
    messages = []
    for role, same in groupby(turns, key=lambda turn: turn["role"]):
        parts = []
        for turn in same:
            parts += turn["content"]
        messages.append({"role": role, "content": parts if role == "user" else parts[0]["text"]})
    return messages


# -------------------------------------------------------------------------------------------------- the model
class RemoteModel:
    """A model behind an OpenAI-compatible URL, in LiveModel's place: what each method is for stands there."""

    def __init__(self, url, name, key="", timeout=60.0, temperature=0.0, seed=0):
        need(re.match("https?://[^/]", url), f"--url {url}: must begin with http:// or https://")
        self.url = url.rstrip("/") + "/chat/completions"
        self.name = name
        self.key = key
        self.timeout = timeout               # seconds of one request
        self.temperature = temperature
        self.seed = seed
        self.capacity = math.inf             # the server says when a context is too long
        self.messages = []
        self.tokens = 0                      # in the context
        self.prefilled = 0                   # of them, not written by the model
        self.side = 0                        # spent outside this context, or forgotten
        self.answered = 0                    # requests

    def request(self, messages, max_new, deadline=math.inf, **sampling):
        """The text of one reply; ModelFailed with what went wrong, whatever it is."""
        body = {"model": self.name, "messages": joined(messages), "max_tokens": max_new, "temperature": 0}
        body.update(sampling)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)

        def read():
            with urllib.request.build_opener(NoRedirects).open(request, timeout=self.timeout) as reply:
                return reply.read(REPLY_BYTES)
        try:
            reply = json.loads(within(deadline, read, most=self.timeout))
            text = reply["choices"][0]["message"]["content"] or ""
            self.answered += 1
            return text[:LETTERS_KEPT * max_new].partition("</tool_call>")[0]
        except FAILURES as error:
            raise ModelFailed(f"{self.url}: {type(error).__name__}: {error}"[:300]) from error

    def append(self, message, room=math.inf):
        new = convert(message)
        if new.tokens > room:
            return False
        self.messages.append(new.turn)
        self.tokens += new.tokens
        self.prefilled += new.tokens
        return True

    def generate(self, max_new, stop=(), opening="", first="", deadline=math.inf):
        sampling = {}
        if self.temperature:
            sampling = {"temperature": self.temperature, "seed": self.seed}
        text = self.request(self.messages, max_new, deadline, **sampling)
        new = convert({"role": "assistant", "content": text or "(nothing)"})
        self.messages.append(new.turn)
        self.tokens += new.tokens
        return text

    def ask(self, messages, max_new, room=math.inf):
        converted = [convert(message) for message in messages]
        needed = sum(message.tokens for message in converted) + max_new
        need(needed <= room, f"a separate look needs {needed} tokens, {room} are left")
        self.side += needed
        return self.request([message.turn for message in converted], max_new)

    def score(self, choices, opening="", messages=None, room=math.inf):
        """0 for the choice that the model names, NOT_NAMED for others; 0 for all where it names several."""
        if messages is not None:
            reply = self.ask(messages, CHOICE_TOKENS, room)
        elif opening == FORCED:              # the forced turn itself names the option
            return [0.0] * len(choices)
        else:
            reply = self.name_one(choices)
        named = [choice for choice in choices if re.search(rf"\b{re.escape(choice)}", reply.lower())]
        need(named or messages is None, f"the model named none of {', '.join(choices)}")
        if len(named) != 1:
            return [0.0] * len(choices)
        return [0.0 if choice == named[0] else NOT_NAMED for choice in choices]

    def name_one(self, choices):
        """The model's choice in this context, which is left as it was. A server that fails leaves all open:
        the next turn will say so."""
        question = convert({"role": "user", "content": f"Name what fits, one word: {', '.join(choices)}."})
        self.side += question.tokens + CHOICE_TOKENS
        try:
            return self.request([*self.messages, question.turn], CHOICE_TOKENS)
        except ModelFailed:
            return ""

    def likelihood(self, words):
        return None                          # the API tells no probabilities

    def mark(self):
        return self.tokens, len(self.messages)

    def rewind(self, mark):
        tokens, messages = mark
        self.side += self.tokens - tokens
        self.tokens = tokens
        del self.messages[messages:]


# ------------------------------------------------------------------------------------------------ the command
def main():
    parser = parser_of("Answer a question about a video by a model behind a URL.")
    parser.add_argument("--url", required=True,
                        help="an OpenAI-compatible server (http://host/v1): frames and questions are sent "
                        "there, with the key in the variable MCR_API_KEY if it is set")
    parser.add_argument("--api-model", metavar="NAME", required=True, help="model's name at --url")
    args = parser.parse_args()
    check_args(args)
    need(args.question is not None, 'give VIDEO and "question"')
    key = os.environ.get("MCR_API_KEY", "")
    live = RemoteModel(args.url, args.api_model, key, temperature=args.temperature, seed=args.seed)
    asked = RemoteModel(args.url, args.api_model, key)  # captions are not the rollout's tokens
    ask_about(args, live, asked, [args.url, args.api_model], describe_tools=True)
    need(live.answered, f"--url {args.url}: answered no request; see the steps above")


if __name__ == "__main__":
    run_cli(main)
