"""A scratch copy of what git tracks or would track: no check needs an ignored file, or changes the checkout."""
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root):
    "Return relative paths of all files that are tracked, or new and not ignored"
    command = ['git', '-c', 'safe.directory=*', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted({path for path in listed.split('\0') if path and (root/path).is_file()})


@contextmanager
def snapshot(root=ROOT):
    "Yield the folder of a scratch copy, removed at the end"
    with tempfile.TemporaryDirectory(prefix='saeexplainer-') as folder:
        copy = Path(folder).resolve()/root.name
        for path in files(root):
            (copy/path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root/path, copy/path)
        yield copy


def changed(root, copy):
    "Return the files that differ between `root` and its `copy`, each with what happened to it in the copy"
    then = set(files(root))
    now = {str(path.relative_to(copy)) for path in copy.rglob('*')
           if path.is_file() and '__pycache__' not in path.parts}
    found = [(path, 'missing') for path in now - then]
    found += [(path, 'left over') for path in then - now]
    found += [(path, 'differs') for path in then & now if (root/path).read_bytes() != (copy/path).read_bytes()]
    return sorted(found)
