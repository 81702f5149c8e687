"""What the harnesses' tests ask."""

import pytest

N = 48


@pytest.fixture(scope="session")
def scenes():
    """The study's first questions."""
    from fastmmoe.study.questions import scene_questions

    return scene_questions("test", N)


@pytest.fixture(scope="session")
def session():
    """The study, of those questions."""
    from fastmmoe.study.study import Session, Settings

    return Session(Settings(n=N))
