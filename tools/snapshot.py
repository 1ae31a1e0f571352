"""A scratch copy of what git tracks or would track, so that a check neither depends on ignored files nor changes a file of the checkout."""
import shutil, subprocess, tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def files(root):
    "Relative paths of all files that are tracked, or new and not ignored"
    listed = subprocess.run(['git', '-c', 'safe.directory=*', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                            cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted({o for o in listed.split('\0') if o and (root/o).is_file()})

@contextmanager
def snapshot(root=ROOT):
    "The folder of a scratch copy, removed at the end"
    with tempfile.TemporaryDirectory(prefix='saeexplainer-') as folder:
        copy = Path(folder).resolve()/root.name
        for o in files(root):
            (copy/o).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/o, copy/o)
        yield copy

def changed(root, copy):
    "Files that differ between `root` and its `copy`, each with what happened to it in the copy"
    then = set(files(root))
    now = {str(o.relative_to(copy)) for o in copy.rglob('*') if o.is_file() and '__pycache__' not in o.parts}
    return sorted([(o, 'missing') for o in now - then] + [(o, 'left over') for o in then - now]
                  + [(o, 'differs') for o in then & now if (root/o).read_bytes() != (copy/o).read_bytes()])
