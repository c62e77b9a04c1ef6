"""Scores: what a painted picture holds, GenEval's rules, the demo's exams.

- ``scorer``: which objects a picture holds, by template matching; ``validation`` says how far it can be trusted.
- ``geneval``: GenEval's rules and scores; ``folders``: its folders of pictures.
- ``exam``: the demo's painting, answering and reconstruction exams; ``answers``: what makes an answer right.
"""

from .folders import score_folder
from .geneval import judge, summarise
from .scorer import Detection, read_picture, read_pictures

__all__ = ["Detection", "judge", "read_picture", "read_pictures", "score_folder", "summarise"]
