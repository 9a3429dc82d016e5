"""What pyproject.toml cannot say: in the package's metadata, the README's links and images are absolute."""

import re
from pathlib import Path

from setuptools import setup


def absolute(readme: str, home: str) -> str:
    """``readme`` with every relative link to the file, and every relative image to its raw content, at ``home``."""
    pages, raw = f"{home}/blob/main/", f"{home.replace('github.com', 'raw.githubusercontent.com')}/main/"
    readme = re.sub(r'(<img src=")(?!https?:)', rf"\g<1>{raw}", readme)
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{raw}", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{pages}", readme)


here = Path(__file__).parent
home = re.search(r'^Homepage = "(.*)"$', (here / "pyproject.toml").read_text(), re.M).group(1)
setup(long_description=absolute((here / "README.md").read_text(), home), long_description_content_type="text/markdown")
