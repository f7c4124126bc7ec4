import time
import numpy as np
def test_probe(exported, torch_runner, ort_runner, random_prompts):
    from mskip.exporters.runner import left_padded
    print(exported.report)
    ids, mask = left_padded(random_prompts([3,9,5,1,7,6,4,8]), exported.contract.pad)
    a = torch_runner.prefill(ids, mask); b = ort_runner.prefill(ids, mask)
    print(a.routing, a.scores); print((a.routing==b.routing).all())
    same=ort_runner.prefill(ids, mask, routing=a.routing)
    print(np.abs(a.logits-same.logits)[mask==1].max(), np.abs(a.logits).max())
    c = torch_runner.extend(a, ids[:, :1]); d = ort_runner.extend(b, ids[:, :1])
    print(c.scores, d.scores)
    import os
    for f in sorted(exported.folder.iterdir()): print(f.name, f.stat().st_size)
    print(exported.contract.eos, exported.contract.pad)
    print(open(exported.run.path/'samples.jsonl').read()[:600])
def test_tied(exported_tied): print(exported_tied.report)
