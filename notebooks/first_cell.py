"""The first cell of every notebook, without this line; tests compare them."""

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

# In a folder of this project, cloned or unpacked, leave this empty. Where the notebook is alone, as on Colab,
# write the address of a copy: https://…/NAME.git, or https://…/NAME.zip.
URL = ""

if not Path("../locus_mini.py").exists():  # the notebook is alone
    if not URL:
        raise SystemExit("This notebook needs the rest of its project: set URL to the address of a copy.")
    if URL.endswith(".zip"):
        urllib.request.urlretrieve(URL, "copy.zip")
        shutil.unpack_archive("copy.zip", "copy")
    elif not Path("copy").exists():
        subprocess.run(["git", "clone", "--quiet", URL, "copy/project"], check=True)
    os.chdir(next(Path("copy").rglob("locus_mini.py")).parent / "notebooks")
    packages = ["-r", "../requirements.txt", "-r", "requirements.txt"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
sys.path.insert(0, str(Path.cwd().parent))
