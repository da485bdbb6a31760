"""Recorded by pycocoevalcap 1.2 on invented captions."""
import json, random
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.cider.cider import Cider
r=random.Random(7)
who=["a man","two dogs","a small boy","the old woman","three children","a cyclist","someone's cat","a girl in a red coat"]
does=["runs along","jumps over","is sitting on","looks at","plays near","sleeps beside","climbs up"]
where=["the wet grass","a wooden fence","the beach at dusk","a pile of snow","an empty road","the mountain","a blue car"]
more=["","","with a ball","in the rain","while others watch","and smiles"]
def sent(): return " ".join(x for x in (r.choice(who),r.choice(does),r.choice(where),r.choice(more)) if x)
def near(s):
    w=s.split()
    for _ in range(r.randint(0,3)):
        k=r.randint(0,2); i=r.randrange(len(w))
        if k==0 and len(w)>2: w.pop(i)
        elif k==1: w.insert(i,r.choice(["very","the","dog","quickly","a"]))
        else: w[i]=r.choice(["stone","walks","big","man"])
    return " ".join(w)
def case(n,refs):
    out={"said":[],"references":[]}
    for _ in range(n):
        base=sent(); out["references"].append([near(base) for _ in range(r.randint(*refs))]); out["said"].append(near(base) if r.random()<.8 else sent())
    gts={i:x for i,x in enumerate(out["references"])}; res={i:[x] for i,x in enumerate(out["said"])}
    b,_=Bleu(4).compute_score(gts,res,verbose=0); ro,rs=Rouge().compute_score(gts,res); c,cs=Cider().compute_score(gts,res)
    out|={"bleu":b,"rouge_l":float(ro),"rouge_l_each":[float(x) for x in rs],"cider_d":float(c),"cider_d_each":[float(x) for x in cs]}
    return out
cases={"five references each":case(12,(5,5)),"one reference each":case(8,(1,1)),"one to four references":case(15,(1,4))}
e={"said":["a dog","the the the the the the the","a man on a horse jumps over a fence and then another fence again","dog"],
 "references":[["a dog runs through the grass","a dog"],["the cat is on the mat","there is a cat on the mat"],["a man on a horse","a horse jumps over a fence"],["a man and a dog","dog"]]}
gts={i:x for i,x in enumerate(e["references"])}; res={i:[x] for i,x in enumerate(e["said"])}
b,_=Bleu(4).compute_score(gts,res,verbose=0); ro,rs=Rouge().compute_score(gts,res); c,cs=Cider().compute_score(gts,res)
cases["too short, too long, repeated"]=e|{"bleu":b,"rouge_l":float(ro),"rouge_l_each":[float(x) for x in rs],"cider_d":float(c),"cider_d_each":[float(x) for x in cs]}
json.dump({"made_by":"pycocoevalcap 1.2 (Bleu, Rouge and Cider, on captions without its tokenizer: they are lower case without punctuation)","cases":cases},open("/tmp/w8/caption/tests/data/caption_metrics.json","w"),indent=1)
