import torch
from pathlib import Path
import importlib.util, pytest
spec_=importlib.util.spec_from_file_location("tt", Path(__file__).with_name("test_tuning.py")); tt=importlib.util.module_from_spec(spec_); spec_.loader.exec_module(tt)
def test_a(base, make_samples, tmp_path):
    samples = make_samples(24, prompt=(6, 6), answer=(4, 4))
    def run(f, **o):
        r,p = tt.start(base, tt.LAYERS, samples, .5)
        return tt.tune(base, r, samples, tt.spec(), .5, tmp_path/f, start_price=p, **o)
    w=run("w"); w2=run("w2")
    for a,b in zip(w.trace,w2.trace): print(a,b,sep="\n")
    with pytest.raises(tt.Interrupted): run("c", progress=tt.interrupt_at(2))
    c=run("c",resume=True)
    for a,b in zip(w.trace,c.trace): print(a,b,sep="\n")
