"""Make the site's font for formulas, tools/site_assets/math.woff2: `python tools/math_font.py STIXMath-Regular.otf`

The source is in Debian's fonts-stix. Needs fonttools and brotli. The subset holds what LaTeX formulas use, with the
MATH table; it has a name of its own, as a changed font should.
"""
import sys
from pathlib import Path

from fontTools.subset import Options, Subsetter, load_font, parse_unicodes, save_font

TO = Path(__file__).resolve().parent/'site_assets'/'math.woff2'
NAME = 'Saeexplainer Math'
PLAIN = NAME.replace(' ', '')
NAMES = {1: NAME, 3: f'{NAME}, a subset of STIX Math 1.1.1', 4: NAME, 6: PLAIN}  # by their number in the font
LETTERS = '20-7E,A0-FF,131,237,302-304,307-308,391-3A9,3B1-3D6,3F5'
SIGNS = ('2010-2026,2032-2037,2061-2064,20D7,2100-214F,2190-2199,21A6,21D0-21D5,2200-22F1,2308-230B,239B-23AE,'
         '23DC-23E1,25A1,25CB,27E6-27EB,27F5-27FC,2A00-2A02,2A7D-2A7E,2AAF-2AB0,FE00')
BOLD_TO_DOUBLE_STRUCK = '1D400-1D467,1D49C-1D4CF,1D538-1D56B'
DOTLESS_GREEK_DIGITS = '1D6A4-1D6A5,1D6E2-1D71B,1D7CE-1D7E1'
KEPT = ','.join([LETTERS, SIGNS, BOLD_TO_DOUBLE_STRUCK, DOTLESS_GREEK_DIGITS])


def rename(font):
    for record in list(font['name'].names):
        new = NAMES.get(record.nameID)
        if new: font['name'].setName(new, record.nameID, record.platformID, record.platEncID, record.langID)
    font['CFF '].cff.fontNames = [PLAIN]
    font['CFF '].cff[0].rawDict.update(FullName=NAME, FamilyName=NAME)


def main(source):
    options = Options(flavor='woff2', name_IDs=['*'], drop_tables=['FFTM', 'DSIG'])
    options.layout_features = ['ssty', 'dtls', 'flac', 'ccmp', 'kern', 'mark', 'mkmk']
    font = load_font(source, options)
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=parse_unicodes(KEPT))
    subsetter.subset(font)
    rename(font)
    save_font(font, TO, options)


if __name__ == '__main__': main(sys.argv[1])
