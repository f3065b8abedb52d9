"""What the users of a bench say: personas, transcripts and utterances, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_TOKENS_A_WORD = 1.3
"""Of English in the vocabularies of today's models, punctuation included. Sizes are approximate for that reason."""

UTTERANCES = (
    "Tell me a long story about a lighthouse keeper and a storm.",
    "Explain in detail how bread rises, as if I had never seen an oven.",
    "What would you pack for two weeks in the mountains, and why each thing?",
    "Describe the city you would build if nobody could stop you.",
    "I can't sleep. Talk to me about the sea for a while.",
    "Walk me through a day on a small farm in autumn.",
    "Why do people like sad songs so much? Take your time.",
    "Invent a creature that lives under a bridge and tell me its life.",
    "What happened between the dinosaurs and us? Give me the long version.",
    "Talk me through repairing an old bicycle, step by step.",
    "Describe a rainy train ride through three countries.",
    "Tell me about the strangest dinner party you can imagine.",
    "How does a city wake up in the morning? Paint me a picture.",
    "Give me a pep talk before my exam, and don't be short.",
    "If trees could gossip, what would they say about us?",
    "Tell me how glaciers move and what they leave behind.",
    "Make up a legend about how the moon got its scars.",
    "What makes a good friend? I want more than one sentence.",
    "Describe my apartment as if it were a castle.",
    "How did sailors find their way before there were maps?",
    "Tell me everything you know about honey.",
    "I had a terrible day at work. Distract me with a story.",
    "Explain how a piano makes a sound, from the key to the ear.",
    "What would a cat write in its diary over a whole week?",
    "Describe the first hour on another planet.",
    "Tell me about a chess match between two old rivals.",
    "How would you teach a child what time is?",
    "Talk about the smell of old books and where it takes you.",
    "Invent a holiday and explain all of its customs.",
    "What goes on inside a thunderstorm?",
    "Tell me the history of a single coin, from mint to pocket.",
    "Describe a market at midnight where everything is for sale.",
    "How do bees decide where to live? Give me the details.",
    "What could I cook with rice, two eggs and a lot of hope?",
    "Tell me about a robot that learns to garden.",
    "Explain why the sky changes its colour in the evening.",
    "Describe a walk home after the last bus has gone.",
    "What should I say to my neighbour who sings at night?",
    "Tell me a mystery that happens in a library.",
    "Imagine we are on a ship. What do you see from the deck?",
)

_TRAITS = (
    "You speak in a calm and even voice and never hurry anyone.",
    "You grew up near a harbour and compare most things with boats.",
    "You remember what people told you and come back to it later.",
    "You laugh easily, mostly about yourself.",
    "When you do not know something you say so at once.",
    "You like short words and honest answers.",
    "You collect old maps and know a story for each of them.",
    "You ask one question at a time and wait for the answer.",
    "You never give medical advice, but you always listen.",
    "You are fond of tea, long trains and bad weather.",
    "You worked in a theatre once and still describe the light of every scene.",
    "You call people by their name when they have told it to you.",
    "You distrust shortcuts and enjoy the long way round.",
    "You keep a small garden and speak of it as of a relative.",
    "You can be teased, and you tease back with care.",
    "You avoid lists, because nobody speaks in lists.",
    "You are curious about how things are made.",
    "You would rather tell a story than give an opinion.",
    "You notice when someone is tired and make your answers softer.",
    "You have strong feelings about soup.",
    "You learned three languages and mix up their proverbs.",
    "You think that music explains most of what words cannot.",
    "You once crossed a desert and still save water.",
    "You find numbers friendly and use them like spices.",
    "You are patient with children and with machines.",
    "You believe that every street has a secret.",
)

_ANSWERS = (
    "That is a fine thing to wonder about, and I have wondered about it too.",
    "Let me think. I would start with the weather, because it decides most things.",
    "The short answer is yes, and the long answer has a boat in it.",
    "My grandmother would have said that you should sleep on it first.",
    "I like that. It sounds like the beginning of something.",
    "There is a trick to it, and the trick is to go slowly.",
    "You told me about your sister last week; did she ever call back?",
    "Honestly, I do not know, but I can tell you how I would find out.",
    "It depends on the light. In the evening everything is easier.",
    "First you need a good knife, and then you need somebody hungry.",
    "I have heard that story in three towns, with three different endings.",
    "Then we should take the other road and see where it goes.",
)


@dataclass(frozen=True, slots=True)
class Story:
    """What one session brings along: a persona, and a transcript in lines of `User:` and `Assistant:`."""

    persona: str
    history: str


class Prompts:
    """Stories and utterances from a seed.

    Prefix caches share a chain from the first token, so each persona opens with `nonce` and with who it belongs to:
    nothing is shared between users, and nothing with an earlier bench on the same server. With `shared_persona` all
    users share one persona, and only histories differ.
    """

    def __init__(
        self, seed: int, nonce: str, *, persona_tokens: int, history_tokens: int, shared_persona: bool = False
    ) -> None:
        self._seed, self._nonce = seed, nonce
        self._persona_words = round(persona_tokens / _TOKENS_A_WORD)
        self._history_words = round(history_tokens / _TOKENS_A_WORD)
        self._shared = shared_persona

    def story(self, user: int, variant: int = 0) -> Story:
        """The story of one user; another `variant` shares nothing with the first but its length."""
        owner = "all" if self._shared else f"{user}-{variant}"
        persona = _fill(self._random("persona", owner), _TRAITS, self._persona_words, f"Story {self._nonce} {owner}.")
        chosen = self._random("history", f"{user}-{variant}")
        history: list[str] = []
        words = 0
        while words < self._history_words:
            lines = f"User: {chosen.choice(UTTERANCES)}", f"Assistant: {chosen.choice(_ANSWERS)}"
            history += lines
            words += sum(len(line.split()) for line in lines)
        return Story(persona, "\n".join(history))

    def utterance(self, user: int, turn: int) -> str:
        """All users ask for long answers; no user asks twice in a row for the same."""
        order = self._random("utterances", str(user)).sample(UTTERANCES, len(UTTERANCES))
        return order[turn % len(order)]

    def _random(self, *what: str) -> random.Random:
        return random.Random("/".join((str(self._seed), *what)))


def _fill(chosen: random.Random, sentences: Sequence[str], words: int, opening: str) -> str:
    """About as many words of sentences as wanted, after the opening."""
    text, count = [opening], len(opening.split())
    order: list[str] = []
    while count < words:
        order = order or chosen.sample(sentences, len(sentences))
        text.append(order.pop())
        count += len(text[-1].split())
    return " ".join(text)
