"""Writes the small synthetic corpus of this repository: invented abstracts in the style of clinical papers.

Worth knowing:

1. The corpus is synthetic. Every sentence and every figure is made up here; nothing in it is a medical finding.
2. The label is what the study is about. Every abstract also names conditions of other classes, as an exclusion, a
   comorbidity, a control group, a cited earlier work and so on, about as often as the studied one: counting words does
   not tell which is which.
3. A ``*`` marks the conditions and wordings that training rows never hold. Three in four conditions of the validation
   and test rows are such ones, with the treatments and measures that go with them, and a third of the wordings.
4. A tumor counts as a neoplasm wherever it grows. ``general pathological conditions`` are symptoms and processes, such
   as pain, fever or sepsis, studied for their own sake. A few training rows study a disease of some other organ, and
   carry the inner node ``specific disease``.
5. Everything is drawn with ``random.Random(SEED).random()``, the one method whose sequence Python promises to keep, so
   the files come out the same byte for byte on every version and platform.

    python examples/make_corpus.py [--output_dir examples]
"""

import argparse
import csv
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")

GENERAL = "general pathological conditions"
OTHER = "specific disease"

SEED = 0
# rows of each label in a split; uneven, as classes are
ROWS = {
    "train": {
        GENERAL: 202,
        "neoplasms": 176,
        "digestive system diseases": 118,
        "nervous system diseases": 130,
        "cardiovascular diseases": 150,
        OTHER: 24,
    },
    "validation": {
        GENERAL: 26,
        "neoplasms": 22,
        "digestive system diseases": 15,
        "nervous system diseases": 17,
        "cardiovascular diseases": 20,
    },
    "test": {
        GENERAL: 39,
        "neoplasms": 33,
        "digestive system diseases": 23,
        "nervous system diseases": 26,
        "cardiovascular diseases": 29,
    },
}
HELD_OUT_CONDITIONS = 0.75  # share of the conditions in validation and test rows that training rows do not hold
HELD_OUT_WORDINGS = 0.35
MIN_WORDS, MAX_WORDS, MAX_SENTENCES = 50, 110, 6

# condition | another name for it | a treatment | a second treatment | what is measured; a line that opens with a bar
# goes on with the one above
CONDITIONS = {
    GENERAL: """
        postoperative pain | pain after surgery | intravenous morphine | wound infiltration with bupivacaine
            | the pain score
        fever of unknown origin | unexplained fever | empirical antibiotics | watchful waiting | body temperature
        surgical wound infection | infection of the incision | a single preoperative dose of cefazolin
            | povidone-iodine irrigation | the rate of purulent discharge
        septic shock | sepsis with shock | early fluid resuscitation | low-dose hydrocortisone | arterial lactate
        chronic fatigue | persistent tiredness | graded exercise | rest and pacing | the fatigue scale
        peripheral edema | swelling of the ankles | compression stockings | leg elevation | ankle circumference
        postoperative nausea | vomiting after anesthesia | ondansetron | droperidol | the number of emetic episodes
        hemorrhagic shock | shock from blood loss | rapid crystalloid infusion | transfusion of packed red cells
            | the base deficit
        systemic inflammation | the acute phase response | indomethacin | fish oil | C-reactive protein
        protein-energy malnutrition | undernutrition | enteral feeding | oral supplements | body mass index
        perioperative blood loss | bleeding during operations | tranexamic acid | cell salvage
            | the hemoglobin concentration
        generalized itching | pruritus | emollient cream | antihistamine tablets | the itch diary
        accidental hypothermia | lowering of the core temperature | warmed infusions | forced-air blankets
            | the rewarming time
        catheter-related bacteremia | bloodstream infection from central lines | chlorhexidine dressings
            | routine line exchange | the number of positive cultures
        dehydration | fluid depletion | oral rehydration solution | intravenous saline | urine osmolality
        delayed wound healing | poor healing of wounds | hydrocolloid dressings | vacuum dressings | the time to closure
        * involuntary weight loss | unintended loss of weight | megestrol acetate | dietary counseling | lean body mass
        intractable hiccup | persistent hiccup | baclofen | chlorpromazine | the number of attacks a day
        multiple organ failure | failure of several organs | continuous hemofiltration | dopexamine
            | the organ dysfunction score
        * shivering after anesthesia | postanesthetic shivering | pethidine | clonidine premedication
            | oxygen consumption
        * nocturnal sweating | excessive sweating | oxybutynin | cotton bedding | the sweating chart
        * wound dehiscence | bursting of the suture line | retention sutures | mass closure with nylon
            | tensile strength
        * hyponatremia | low serum sodium | fluid restriction | hypertonic saline | the plasma sodium
        pressure ulceration of the skin | decubitus ulceration | alternating-air mattresses | two-hourly turning
            | the sore area
        frailty | general weakness of old age | resistance training | vitamin D drops | grip strength
        loss of appetite | anorexia | dronabinol | flavored snacks | daily energy intake
        endotoxemia | endotoxin in the blood | polymyxin infusion | antiendotoxin antibody | tumor necrosis factor
        keloid formation | hypertrophic scarring | silicone sheeting | triamcinolone injection | the scar height
        * heat exhaustion | exhaustion from heat | cold-water immersion | evaporative cooling | the cooling time
        * anaphylactic shock | anaphylaxis | intramuscular epinephrine | intravenous hydrocortisone
            | the rate of late reactions
        postoperative sore throat | sore throat after intubation | benzydamine gargles | a smaller endotracheal tube
            | hoarseness
        * neonatal sepsis | sepsis in newborn infants | ampicillin with amikacin | intravenous zinc
            | the interleukin-6 level
        * labor pain | pain in labor | epidural ropivacaine | inhaled nitrous oxide | maternal satisfaction
        * traumatic hemorrhage | bleeding after injury | recombinant factor VIIa | damage-control packing
            | the number of units transfused
        * nosocomial infection | hospital-acquired infection | hand hygiene | selective decontamination
            | the infection rate
        iron-deficiency anemia | lack of iron | ferrous sulfate | intravenous iron dextran | the ferritin level
        burn injury | extensive burns | early skin grafting | silver sulfadiazine | the healed area
    """,
    "neoplasms": """
        breast cancer | carcinoma of the breast | tamoxifen | lumpectomy followed by irradiation | disease-free survival
        non-small-cell lung cancer | bronchogenic carcinoma | cisplatin with etoposide | lobectomy | median survival
        prostate cancer | carcinoma of the prostate | androgen blockade | radical prostatectomy
            | the prostate-specific antigen
        malignant melanoma | cutaneous melanoma | interferon alfa | wide local excision | nodal metastasis
        ovarian cancer | carcinoma of the ovary | carboplatin | cytoreductive surgery | progression-free survival
        Hodgkin's lymphoma | Hodgkin's disease | mantle irradiation | ABVD chemotherapy | complete remission
        acute myeloid leukemia | acute leukemia | cytarabine with daunorubicin | marrow transplantation
            | the remission rate
        bladder cancer | transitional cell carcinoma | intravesical BCG | transurethral resection | tumor recurrence
        cervical cancer | carcinoma of the cervix | brachytherapy | radical hysterectomy | pelvic tumor control
        renal cell carcinoma | cancer of the kidney | interleukin-2 | partial nephrectomy | metastatic spread
        gastric cancer | adenocarcinoma of the stomach | total gastrectomy with node dissection | adjuvant fluorouracil
            | tumor stage
        colon cancer | carcinoma of the colon | fluorouracil with levamisole | hemicolectomy
            | the rate of hepatic metastases
        thyroid cancer | papillary thyroid carcinoma | radioactive iodine | total thyroidectomy | tumor relapse
        osteosarcoma | osteogenic sarcoma | high-dose methotrexate | limb-sparing resection
            | tumor necrosis in the specimen
        laryngeal cancer | squamous cell carcinoma of the larynx | hyperfractionated radiotherapy | laryngectomy
            | locoregional control
        * hepatocellular carcinoma | cancer of the liver | arterial chemoembolization | percutaneous ethanol injection
            | alpha-fetoprotein
        * multiple myeloma | plasma cell myeloma | melphalan with prednisone | thalidomide | the paraprotein level
        neuroblastoma | childhood neuroblastoma | vincristine with cyclophosphamide | iobenguane therapy
            | urinary catecholamines
        * glioblastoma | malignant glioma | temozolomide | gross total debulking | time to tumor regrowth
        mesothelioma | pleural mesothelioma | pemetrexed | extrapleural pneumonectomy | tumor thickness
        * testicular seminoma | germ cell tumor of the testis | bleomycin | para-aortic irradiation
            | relapse-free survival
        * Wilms' tumor | nephroblastoma | dactinomycin | nephroureterectomy | event-free survival
        * pancreatic carcinoma | cancer of the pancreas | gemcitabine | the Whipple operation | one-year survival
        * Kaposi's sarcoma | endemic sarcoma of the skin | liposomal doxorubicin | vinblastine
            | the number of tumor nodules
        * follicular lymphoma | indolent non-Hodgkin's lymphoma | rituximab | chlorambucil | tumor regression
        * retinoblastoma | intraocular malignancy of infancy | laser photocoagulation with carboplatin | enucleation
            | tumor seeding
        * endometrial cancer | malignancy of the womb | medroxyprogesterone | hysterectomy with node sampling
            | myometrial invasion
        thymoma | tumor of the thymus | thymic resection | octreotide with prednisone | capsular invasion
        carcinoid tumor | intestinal carcinoid | long-acting octreotide | debulking of liver metastases
            | urinary serotonin metabolites
        * chronic lymphocytic leukemia | chronic lymphatic leukemia | fludarabine | alemtuzumab
            | the lymphocyte doubling time
        * Ewing's sarcoma | bone sarcoma of childhood | ifosfamide | en bloc excision | metastasis-free survival
        * basal cell carcinoma | skin cancer of the face | micrographic surgery | imiquimod cream | tumor clearance
    """,
    "digestive system diseases": """
        duodenal ulcer | ulcer of the duodenum | omeprazole | ranitidine | endoscopic healing
        ulcerative colitis | inflammation of the colon | mesalazine | corticosteroid enemas
            | the frequency of bloody stools
        hepatic cirrhosis | cirrhosis of the liver | spironolactone | paracentesis | the volume of ascites
        gallstone disease | cholelithiasis | laparoscopic cholecystectomy | ursodeoxycholic acid
            | the rate of biliary colic
        acute pancreatitis | inflammation of the pancreas | nasojejunal feeding | endoscopic sphincterotomy
            | serum amylase
        gastroesophageal reflux | reflux esophagitis | lansoprazole | fundoplication | esophageal acid exposure
        chronic hepatitis B | hepatitis B infection of the liver | lamivudine | pegylated interferon
            | serum aminotransferase
        acute appendicitis | inflammation of the appendix | appendectomy | ceftriaxone with metronidazole
            | perforation of the appendix
        celiac disease | gluten enteropathy | a gluten-free diet | budesonide | villous height
        irritable bowel syndrome | spastic colon | mebeverine | ispaghula husk | bowel habit
        diverticulitis | diverticular inflammation of the colon | sigmoid resection | a high-fiber diet
            | the rate of colonic perforation
        achalasia | achalasia of the esophagus | pneumatic dilatation | cardiomyotomy | lower sphincter pressure
        primary sclerosing cholangitis | sclerosing cholangitis | biliary stenting | cholestyramine | serum bilirubin
        fatty liver | hepatic steatosis | pioglitazone | weight reduction | liver fat content
        hemorrhoidal disease | prolapse of hemorrhoids | rubber band ligation | hemorrhoidectomy | rectal bleeding
        * Crohn's disease | regional ileitis | azathioprine | infliximab | closure of enteric fistulas
        gastroparesis | delayed gastric emptying | domperidone | erythromycin syrup | the gastric half-emptying time
        * necrotizing enterocolitis | bowel necrosis of the newborn | peritoneal drainage | resection of the ileum
            | intestinal length
        Hirschsprung's disease | aganglionic megacolon | the pull-through procedure | colostomy | stool continence
        anal fissure | tearing of the anal canal | glyceryl trinitrate ointment | lateral sphincterotomy
            | pressure in the anal canal
        infantile pyloric stenosis | obstruction of the pylorus | pyloromyotomy | atropine | vomiting of feeds
        * autoimmune hepatitis | chronic active hepatitis | prednisolone | mycophenolate | necrosis on liver biopsy
        * biliary atresia | obliteration of the bile ducts | portoenterostomy | liver transplantation | bile flow
        sigmoid volvulus | twisting of the sigmoid | colonoscopic decompression | sigmoidopexy | bowel viability
        functional dyspepsia | nonulcer dyspepsia | cisapride | antacid tablets | epigastric fullness after meals
        * acute cholecystitis | inflammation of the gallbladder | cholecystostomy | piperacillin
            | gallbladder wall thickness
        tropical sprue | postinfective malabsorption | tetracycline | folic acid | fecal fat
        * chronic gastritis | Helicobacter gastritis | bismuth triple therapy | sucralfate | mucosal inflammation
        * liver abscess | pyogenic abscess of the liver | percutaneous catheter drainage | needle aspiration
            | cavity size
        * short bowel syndrome | intestinal failure after resection | teduglutide | home parenteral nutrition
            | stool weight
        small bowel obstruction | adhesive obstruction of the intestine | laparoscopic adhesiolysis
            | nasogastric suction | the return of peristalsis
        * alcoholic liver disease | alcoholic hepatitis | pentoxifylline | supervised abstinence | the prothrombin time
        * gastric ulcer | peptic ulcer of the stomach | misoprostol | famotidine | ulcer diameter
        * ischemic colitis | poor blood supply of the colon | bowel rest | segmental colectomy
            | the endoscopic appearance of the colon
    """,
    "nervous system diseases": """
        epilepsy | a seizure disorder | carbamazepine | valproate | seizure frequency
        Parkinson's disease | parkinsonism | levodopa | bromocriptine | tremor and rigidity
        multiple sclerosis | demyelinating disease | interferon beta | methylprednisolone
            | the number of white matter plaques
        migraine | migraine with aura | sumatriptan | propranolol prophylaxis | headache days
        Alzheimer's disease | senile dementia | donepezil | memory training | the mental state score
        bacterial meningitis | meningococcal meningitis | dexamethasone with ampicillin | chloramphenicol
            | the cell count in cerebrospinal fluid
        Guillain-Barre syndrome | acute polyradiculoneuritis | plasma exchange | intravenous immunoglobulin
            | the time to walk unaided
        carpal tunnel syndrome | median nerve entrapment | surgical decompression of the nerve | wrist splinting
            | nerve conduction
        myasthenia gravis | autoimmune myasthenia | pyridostigmine | thymectomy
            | muscle fatigability on nerve stimulation
        trigeminal neuralgia | facial neuralgia | microvascular decompression | oxcarbazepine | attacks of neuralgia
        cerebral palsy | spastic diplegia | botulinum toxin | selective dorsal rhizotomy | limb spasticity
        herpes encephalitis | viral encephalitis | acyclovir | vidarabine | the level of consciousness
        amyotrophic lateral sclerosis | motor neuron disease | riluzole | noninvasive ventilation | motor unit loss
        hydrocephalus | enlargement of the cerebral ventricles | ventriculoperitoneal shunting | third ventriculostomy
            | intracranial pressure
        diabetic polyneuropathy | neuropathy of the feet | amitriptyline | capsaicin cream | vibration sense
        Huntington's chorea | hereditary chorea | tetrabenazine | haloperidol | involuntary movements
        narcolepsy | narcolepsy with cataplexy | modafinil | scheduled naps | sleep latency
        * Bell's palsy | idiopathic facial paralysis | facial nerve decompression | oral prednisone | facial movement
        * cluster headache | cluster-type headache | verapamil | oxygen by mask | the number of headache bouts
        * Tourette's syndrome | chronic tic disorder | pimozide | habit reversal | tic severity
        transverse myelitis | inflammation of the spinal cord | cyclophosphamide pulses | tapered dexamethasone
            | leg power and sphincter control
        * spasmodic torticollis | cervical dystonia | trihexyphenidyl | deep brain stimulation | twisting of the neck
        West syndrome | the infantile spasm syndrome | corticotropin | vigabatrin
            | hypsarrhythmia on the electroencephalogram
        * optic neuritis | inflammation of the optic nerve | pulsed steroids | mitoxantrone | evoked potentials
        vascular dementia | multi-infarct dementia | memantine | cognitive rehabilitation | word recall
        * essential tremor | familial tremor | primidone | thalamotomy | tremor amplitude
        syringomyelia | cavitation of the spinal cord | foramen magnum decompression | syringostomy
            | loss of pinprick sensation
        * dementia with Lewy bodies | Lewy body disease | rivastigmine | quetiapine | fluctuating cognition
        * cerebellar ataxia | hereditary ataxia | buspirone | balance training | gait unsteadiness
        * spinal cord injury | traumatic paraplegia | high-dose methylprednisolone | early spinal stabilization
            | motor recovery below the lesion
        * tuberculous meningitis | tuberculosis of the meninges | pyrazinamide with dexamethasone | ethambutol
            | cranial nerve deficits
        * postherpetic neuralgia | neuralgia after shingles | gabapentin | lidocaine patches | allodynia
        insomnia | chronic sleeplessness | zolpidem | sleep hygiene | the time to fall asleep
        * restless legs syndrome | an irresistible urge to move the legs at night | ropinirole | pramipexole
            | periodic limb movements
    """,
    "cardiovascular diseases": """
        acute myocardial infarction | infarction of the heart | streptokinase | primary angioplasty | infarct size
        atrial fibrillation | irregular atrial rhythm | amiodarone | electrical cardioversion | sinus rhythm
        congestive heart failure | chronic heart failure | enalapril | digoxin | the left ventricular ejection fraction
        essential hypertension | high blood pressure | atenolol | hydrochlorothiazide | diastolic pressure
        mitral stenosis | rheumatic mitral disease | balloon valvotomy | open commissurotomy | valve area
        aortic stenosis | narrowing of the aortic valve | prosthetic valve replacement | valve repair
            | the transvalvular gradient
        unstable angina | angina at rest | heparin | nifedipine | ST-segment change
        coronary artery disease | coronary atherosclerosis | bypass grafting | pravastatin | graft patency
        deep vein thrombosis | venous thrombosis of the leg | warfarin | low-molecular-weight heparin | clot extension
        ventricular tachycardia | malignant arrhythmia | an implanted defibrillator | sotalol
            | the rate of arrhythmic events
        hypertrophic cardiomyopathy | asymmetric septal hypertrophy | septal myectomy | disopyramide
            | the outflow gradient
        infective endocarditis | endocarditis of the native valves | valve surgery | penicillin with gentamicin
            | vegetation size
        abdominal aortic aneurysm | aneurysm of the aorta | endovascular repair | open graft replacement
            | aneurysm diameter
        intermittent claudication | peripheral arterial disease | cilostazol | femoropopliteal bypass
            | the ankle pressure index
        tetralogy of Fallot | cyanotic congenital heart disease | early complete correction | a systemic-pulmonary shunt
            | right ventricular pressure
        * pulmonary embolism | embolism of the pulmonary artery | alteplase | a caval filter | perfusion defects
        * patent ductus arteriosus | persistent arterial duct | coil closure | ductal ligation
            | shunt flow through the duct
        complete heart block | third-degree atrioventricular block | dual-chamber pacing | isoprenaline
            | ventricular rate
        Kawasaki disease | coronary arteritis of childhood | aspirin in high dose | gamma globulin | coronary dilatation
        * aortic dissection | dissection of the aortic wall | emergency root replacement | labetalol
            | patency of the false lumen
        * coarctation of the aorta | aortic coarctation | end-to-end anastomosis | balloon dilatation of the isthmus
            | the arm-leg gradient
        * viral myocarditis | inflammation of the heart muscle | carvedilol | bed rest with digitalis
            | ventricular dilatation
        Wolff-Parkinson-White syndrome | ventricular preexcitation | radiofrequency ablation | flecainide
            | accessory pathway conduction
        * constrictive pericarditis | thickening of the pericardium | pericardiectomy | colchicine
            | right atrial pressure
        thromboangiitis obliterans | Buerger's disease | iloprost | lumbar sympathectomy | healing of ischemic toes
        * mitral regurgitation | leakage of the mitral valve | annuloplasty | hydralazine | the regurgitant volume
        chronic venous insufficiency | venous reflux of the legs | saphenous stripping | sclerotherapy
            | venous refilling time
        * supraventricular tachycardia | paroxysmal atrial tachycardia | adenosine | diltiazem
            | conversion of the rhythm
        * dilated cardiomyopathy | enlargement of the heart | metoprolol | heart transplantation
            | left ventricular volume
        * ventricular septal defect | defect of the ventricular septum | patch closure | pulmonary artery banding
            | the shunt ratio
        * pulmonary hypertension | high pressure in the pulmonary artery | bosentan | inhaled prostacyclin
            | pulmonary vascular resistance
        * variant angina | coronary spasm | nisoldipine | isosorbide dinitrate | ST elevation
        thrombophlebitis | phlebitis of the superficial veins | fondaparinux | heparinoid gel | vein tenderness
        * atrial septal defect | defect of the atrial septum | transcatheter occlusion | surgical septal repair
            | the pulmonary-to-systemic flow
    """,
    OTHER: """
        bronchial asthma | allergic asthma | inhaled budesonide | salmeterol | peak expiratory flow
        psoriasis | plaque psoriasis | calcipotriol ointment | ultraviolet phototherapy | the extent of skin plaques
        rheumatoid arthritis | inflammatory polyarthritis | methotrexate | sulfasalazine | the swollen joint count
        IgA nephropathy | chronic glomerulonephritis | lisinopril | cyclosporine | proteinuria
        gout | gouty arthritis | allopurinol | probenecid | serum urate
        postmenopausal osteoporosis | bone loss after the menopause | alendronate | calcium tablets
            | vertebral bone density
        senile cataract | lens opacity | phacoemulsification | extracapsular extraction | visual acuity
        cystic fibrosis | mucoviscidosis | nebulized tobramycin | chest physiotherapy | forced expiratory volume
        Graves' disease | hyperthyroidism | carbimazole | subtotal thyroidectomy | serum thyroxine
        pulmonary tuberculosis | tuberculosis of the lung | rifampin with isoniazid | streptomycin | sputum conversion
    """,
}

# {T} the studied condition, {t} and {u} its treatments, {o} what is measured, {n} patients, {k} of them
TRIAL = """
    We randomly assigned {n} patients with {T} to {t} or to {u}.
    In this trial, {n} patients with {T} received either {t} or {u}.
    The purpose of the study was to compare {t} with {u} in the treatment of {T}.
    To find out whether {t} can help against {T}, we gave half of {n} patients this treatment and the rest {u}.
    A total of {n} subjects suffering from {T} took part in a double-blind comparison of {t} and {u}.
    We asked whether {T} responds better to {t} than to {u}, and enrolled {n} patients.
    The efficacy of {t} in {T} was tested against {u} in {n} patients at {k} hospitals.
    Which treatment suits {T} best is still debated, so {t} and {u} were compared in {n} patients.
    This report gives the {y}-year results of a trial of {t} against {u} for {T}.
    * Treatment of {T} was allocated by sealed envelope: {t} for one half of the {n} participants, {u} for the other.
    * Whether {t} can replace {u} in the management of {T} was put to the test in {n} patients.
    * Our randomized study addressed {T}, setting {t} against {u} in {n} persons.
"""
COHORT = """
    We followed {n} patients with {T} for {y} years.
    The records of {n} consecutive cases of {T} were reviewed.
    The course of {T} was studied prospectively in {n} patients.
    This paper describes our experience with {T} over {y} years, in which {n} patients were seen.
    The aim was to learn which features predict the outcome of {T}; {n} patients were examined.
    To clarify how {T} develops, we examined {n} patients at intervals of {m} months.
    We report {n} patients in whom {T} was recognized and treated with {t} at our hospital.
    Because little is known about {T} in everyday practice, we analyzed {n} patients from {k} districts.
    A registry was used to determine how often {T} occurs and how it is treated; {n} cases were found.
    * A series of {n} cases of {T} forms the basis of this survey, which covers {y} years.
    * The natural history of {T} was the subject of this investigation of {n} patients.
    * Here we look back on {y} years of caring for {n} people affected by {T}.
"""
TRIAL_RESULT = """
    {O} favored {t} ({p}).
    With regard to {o}, the first treatment proved superior ({p}).
    At {m} months the largest difference between the groups was that in {o} ({p}).
    The first treatment was successful in {q} %, the second in {r} %.
    At {m} months the difference between the two groups was significant ({p}).
    In {q} % of the first group and {r} % of the second the result was rated as good.
    * The main end point spoke in favor of the former ({p}).
    * Both treatments were of use, but the former acted sooner ({p}).
"""
COHORT_RESULT = """
    {O} correlated with age ({p}) but not with body weight.
    The result depended on how early treatment began ({p}).
    In multivariate analysis, {o} proved the strongest predictor of outcome ({p}).
    A favorable result was seen in {q} %, more often in the young than in the old.
    Neither age nor body weight had any influence on the outcome.
    After {m} months {q} % had recovered well enough to return to their usual life.
    * The best guide to outcome proved to be age at onset ({p}).
    * In {q} % of the series treatment had a lasting effect.
"""
CONCLUSION = """
    We conclude that {t} should be considered early.
    These findings support a more active approach to {T}.
    {T} deserves more attention than it has received.
    Our data suggest that the outlook in {T} is better than is commonly believed.
    The results may change the way {T} is managed.
    * In our opinion the first choice should be {t}.
    * Physicians who care for patients with {T} should take these results into account.
"""
NEUTRAL = """
    We conclude that treatment should begin as early as possible.
    Larger studies with longer follow-up are needed to confirm these findings.
    The benefit was maintained at {m} months, and side effects were mild.
    The results were the same at all centers and in all age groups.
    Assessments were made at entry and again after {m} months by an observer unaware of the treatment.
    Follow-up was complete in all but {k} of the patients.
    * It remains to be shown whether the same holds in routine practice.
    * The findings did not change when dropouts were counted as failures.
"""

# {D} and {E} are conditions that the study is not about, {d} a treatment of {D}, {v} what is measured in it
OPENER = """
    {D} has been studied thoroughly, as has the effect of {d} on {v}, but other disorders have received less attention.
    The technique used here was originally developed to measure {v} in {D}.
    Our earlier reports dealt with {D} and its treatment with {d}; the present one does not.
    The role of {d} in {D} is well established; this paper is concerned with another problem.
    Unlike {D}, for which there are many trials of {d}, the disorder considered here has been neglected.
    * Much has been written about {D} and about {d}, and this article adds nothing to that subject.
    * Readers will know our department for its work on {v} in {D}, from which this article departs.
"""
EXCLUSION = """
    Patients with {D} or with {E} were excluded.
    {D} was a reason for exclusion, and so was any need for {d}.
    Subjects with {D} or {E} were not eligible.
    A history of {D} or of {E} precluded entry into the study.
    Nobody with {D} was enrolled, nor was anyone under treatment with {d}.
    We did not admit patients with {D}, since {d} might have affected the results.
    Of those screened, {k} were rejected because of {D} and {k2} because of {E}.
    * Persons known to have {D} or {E} could not participate.
    * Entry was denied to anyone who had needed {d} for {D}.
    * Volunteers were turned away if they had {D} or {E}.
"""
RULED_OUT = """
    There was no evidence of {D} or {E} in any patient.
    {D} had been ruled out beforehand, and so had {E}.
    Neither {D} nor {E} was found in any of them.
    In {k} patients {D} was suspected at first, and {d} considered, but the suspicion could not be confirmed.
    All participants were free of {D} and {E} at entry.
    Careful investigation failed to show {D} or {E}.
    * The possibility of {D} or {E} had been eliminated before referral.
    * A suspicion of {D} was raised in {k}, and dismissed after further tests, so {d} could be withheld.
"""
COMORBIDITY = """
    {K} of the patients also had {D}, and {k2} had {E}.
    {D} was an incidental finding in {k} patients, who were treated with {d}.
    Coexisting {D} was noted in {k} and treated with {d}.
    Among concomitant disorders, {D} and {E} were the most frequent.
    Previous treatment with {d} for {D} was not an obstacle to participation.
    Adjustment for concurrent {D} or {E} did not alter the results.
    * In addition, {k} of the group happened to suffer from {D} and {k2} from {E}.
    * Those with accompanying {D} were treated with {d} in the usual manner.
"""
CONTROLS = """
    The control group consisted of {n2} patients with {D} treated with {d}.
    For comparison, {n2} inpatients with {D} or {E} served as controls.
    Controls were drawn from the clinic where patients with {D} are treated with {d}.
    Values in {n2} control subjects with {D} or {E} were used as a reference.
    * As a reference group we chose {n2} people attending hospital for {D} or {E}.
    * The comparison series was made up of {n2} persons with {D} and others with {E}.
"""
OUTLOOK = """
    Whether the same applies to {D} or {E} is not known.
    These conclusions should not be extended to {D} or {E}.
    Similar observations have been published on {v} in {D}.
    Others have obtained comparable figures in patients treated with {d} for {D}.
    A separate project on {d} in {D} is being planned.
    * No inference about {D} or {E} can be drawn from this material.
    * The findings resemble those that other workers have described with {d} in {D}.
"""
DROPOUT = """
    {K} participants left the study because of {D} and {k2} because of {E}, which were judged unrelated.
    During follow-up {k} patients were withdrawn when {D} was diagnosed and {d} became necessary.
    {D} led to {k} unrelated readmissions, and {E} to {k2}.
    * {K} were lost to the study when they fell ill with {D} and required {d}.
"""
# not for symptoms and processes
FAMILY = """
    A family history of {D} was given by {k} of the patients.
    {K} had a parent or sibling treated with {d} for {D}.
    Relatives of {k} patients had had {D}.
    * In the families of {k} of them, {D} had occurred.
"""
# only where a symptom or process is studied: the disease for which the patients were in hospital
SETTING = """
    The patients had been admitted for {D} or for {E}, but these diagnoses were not the object of the study.
    Most were in hospital because of {D}, although the underlying disease made no difference.
    The underlying illness was {D} in {q} % and {E} in others.
    The diagnosis on admission, most often {D}, had no bearing on the results.
    * They came from wards that look after {D} and {E}, and all diagnoses were pooled.
    * It did not matter whether the patient was being treated for {D} or for {E}.
"""

# written by hand, with no sentence or condition of the texts above
UNSEEN = (
    # general pathological conditions
    "Does paracetamol given by the clock make the days after an operation more bearable? We asked 64 people who had "
    "had a hip replaced to mark how much it hurt, every four hours, on a line from none to unbearable. Anyone with "
    "angina or an earlier stroke had been left out, and one volunteer in whom a lymphoma came to light was withdrawn. "
    "Soreness at rest fell by a third, and fewer people woke at night because it hurt. Regular dosing is a cheap way "
    "of relieving discomfort after surgery.",
    # digestive system diseases
    "Over six years we looked after 41 people whose liver had been inflamed ever since a transfusion brought them the "
    "hepatitis C virus. Ribavirin was added to their weekly injections, and the enzymes that leak from damaged liver "
    "cells fell to normal in 23. None had a tumor on ultrasound. Two had a replaced heart valve and one was taking "
    "medicine for seizures, but this made no difference. Eight still felt tired at the end. Biopsy showed less "
    "scarring of the liver in most of those who responded.",
    # cardiovascular diseases
    "Although beta-blockers are also prescribed against migraine and tremor, nobody with such a complaint entered "
    "this study. We exercised 58 men with chest tightness on effort and narrowed coronary vessels on a treadmill, "
    "before and after four weeks of bisoprolol. They walked two minutes longer before the tracing showed ischemia, "
    "and needed less nitroglycerin. One withdrew with a bleeding stomach ulcer and one because a kidney cancer was "
    "found. The drug raises the threshold at which the heart runs short of oxygen.",
)


class Condition(NamedTuple):
    """A condition with what belongs to it, as noun phrases."""

    names: tuple[str, str]
    treatments: tuple[str, str]
    measure: str


class Pool(NamedTuple):
    """What training rows hold, and what is kept for validation and test rows."""

    seen: list
    held_out: list


def read_pool(text: str) -> Pool:
    """The lines of one of the texts above."""
    rows = [line.strip() for line in re.sub(r"\s*\n\s*\|", " |", text).strip().splitlines()]
    return Pool([row for row in rows if row[0] != "*"], [row[1:].strip() for row in rows if row[0] == "*"])


def read_condition(line: str) -> Condition:
    """One line of ``CONDITIONS``."""
    name, other_name, treatment, other_treatment, measure = (cell.strip() for cell in line.split("|"))
    return Condition((name, other_name), (treatment, other_treatment), measure)


CONDITION_POOLS = {
    label: Pool(*([read_condition(line) for line in lines] for lines in read_pool(text)))
    for label, text in CONDITIONS.items()
}
TRIAL_ROLES = [EXCLUSION, RULED_OUT, COMORBIDITY, DROPOUT]
COHORT_ROLES = [EXCLUSION, RULED_OUT, COMORBIDITY, CONTROLS]
NUMBER_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """One of the items, each as likely as the others."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence[Item]) -> list[Item]:
    """The items in another order."""
    return [item for _, item in sorted(((rng.random(), i), item) for i, item in enumerate(items))]


def pick_from(rng: random.Random, pool: Pool, held_out_share: float) -> Any:
    """One entry of a pool; an entry that training rows do not hold with the probability given."""
    return pick(rng, pool.held_out if pool.held_out and rng.random() < held_out_share else pool.seen)


def numbers(rng: random.Random) -> dict[str, str]:
    """Invented figures for the slots of one sentence."""
    count, better = pick(rng, NUMBER_WORDS), 30 + int(rng.random() * 60)
    return {
        "n": str(24 + int(rng.random() * 400)),
        "n2": str(20 + int(rng.random() * 60)),
        "k": count,
        "K": count.capitalize(),
        "k2": pick(rng, NUMBER_WORDS),
        "y": pick(rng, NUMBER_WORDS),
        "m": pick(rng, ["three", "six", "nine", "12", "18", "24"]),
        "q": str(better),
        "r": str(better - 5 - int(rng.random() * 20)),
        "p": pick(rng, ["p < 0.05", "p < 0.01", "p < 0.001", "p = 0.02", "p = 0.03", "p = 0.004"]),
    }


def fill(template: str, slots: dict[str, str]) -> str:
    """A sentence with its slots filled, beginning with a capital."""
    sentence = template.format(**slots)
    return sentence[0].upper() + sentence[1:]


def compose(rng: random.Random, label: str, training: bool) -> list[str]:
    """The sentences of one abstract about a condition of the class ``label``, with conditions of two other classes.

    Args:
        training: use no condition and no wording that is held out.
    """
    conditions_share = 0.0 if training else HELD_OUT_CONDITIONS
    wordings_share = 0.0 if training else HELD_OUT_WORDINGS
    rival, third, *_ = shuffled(rng, [other for other in CONDITIONS if other not in (label, OTHER)])
    if label != OTHER and rng.random() < 0.2:
        third = OTHER
    studied = pick_from(rng, CONDITION_POOLS[label], conditions_share)
    treatment, other_treatment = shuffled(rng, studied.treatments)
    taken = [studied]

    def other_condition(of_label: str) -> Condition:
        while (found := pick_from(rng, CONDITION_POOLS[of_label], conditions_share)) in taken:
            pass
        taken.append(found)
        return found

    def about(text: str) -> str:
        slots = {"T": pick(rng, studied.names), "t": treatment, "u": other_treatment, "o": studied.measure}
        slots["O"] = studied.measure[0].upper() + studied.measure[1:]
        return fill(pick_from(rng, read_pool(text), wordings_share), slots | numbers(rng))

    def not_about(text: str, of_label: str) -> str:
        condition, second = other_condition(of_label), other_condition(of_label)
        slots = {"D": pick(rng, condition.names), "E": pick(rng, second.names), "d": pick(rng, condition.treatments)}
        slots["v"] = condition.measure
        return fill(pick_from(rng, read_pool(text), wordings_share), slots | numbers(rng))

    aim, result, wrong_roles = pick(rng, [(TRIAL, TRIAL_RESULT, TRIAL_ROLES), (COHORT, COHORT_RESULT, COHORT_ROLES)])
    opens, closes = rng.random() < 0.5, rng.random() < 0.5
    roles = shuffled(rng, wrong_roles)[: pick(rng, [1, 2]) if opens or closes else 2]
    if label == GENERAL and rng.random() < 0.5:
        roles[0] = SETTING
    elif rival != GENERAL and rng.random() < 0.2:
        roles[0] = FAMILY
    wrong = [rival, third, rival, rival]
    middle = [not_about(role, wrong.pop(0)) for role in roles]
    before = [not_about(OPENER, wrong.pop(0))] if opens else []
    after = [not_about(OUTLOOK, wrong.pop(0))] if closes else []
    middle = [*middle, about(result)] if rng.random() < 0.5 else [about(result), *middle]
    end = pick(rng, [CONCLUSION, NEUTRAL, None])
    if end:
        after = shuffled(rng, [*after, about(end)])
    return [*before, about(aim), *middle, *after]


def make_split(rng: random.Random, split: str, used: set[str]) -> list[tuple[str, str]]:
    """Rows (text, label) of one split in random order. ``used`` holds every text so far and grows."""
    rows = []
    for label, number in ROWS[split].items():
        for _ in range(number):
            while True:
                sentences = compose(rng, label, training=split == "train")
                text = " ".join(sentences)
                if len(sentences) <= MAX_SENTENCES and MIN_WORDS <= len(text.split()) <= MAX_WORDS and text not in used:
                    break
            used.add(text)
            rows.append((text, label))
    return shuffled(rng, rows)


def write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Writes UTF-8 with bare line feeds, the same on every platform."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def main() -> None:
    """Writes ``corpus/train.csv``, ``corpus/validation.csv``, ``corpus/test.csv`` and ``unseen.csv``."""
    parser = argparse.ArgumentParser(description="Write the synthetic corpus.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().output_dir

    rng, used = random.Random(SEED), set(UNSEEN)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        write_csv(folder / "corpus" / f"{split}.csv", ("text", "label"), make_split(rng, split, used))
    write_csv(folder / "unseen.csv", ("text",), [(text,) for text in UNSEEN])


if __name__ == "__main__":
    main()
