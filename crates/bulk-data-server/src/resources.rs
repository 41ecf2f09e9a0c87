//! Resources of the synthetic population as NDJSON, in the shape that US Core servers send.

use std::fmt::Write;

use chrono::{Duration, SecondsFormat};

use crate::population::{DEMO_TYPES, Population, Random, ResourceState};

const GIVEN: [&str; 24] = [
    "Ana", "Björn", "Carlos", "Dana", "Eleni", "Fatima", "Grace", "Hiroshi", "Ines", "Jamal", "Kim", "Lars", "Mei",
    "Noah", "Olga", "Priya", "Quentin", "Rosa", "Samuel", "Tariq", "Uma", "Viktor", "Wanda", "Zoë",
];
const FAMILY: [&str; 24] = [
    "Abbott", "Bauer", "Castillo", "Dubois", "Eriksen", "Fischer", "García", "Hughes", "Ito", "Jansen", "Kowalski",
    "Larsen", "Müller", "Nguyen", "O'Brien", "Patel", "Quinn", "Rossi", "Schmidt", "Tanaka", "Ueda", "Vasquez",
    "Wright", "Zhang",
];
const STREETS: [&str; 8] = [
    "Oak Street",
    "Main Street",
    "Lake View Road",
    "Hill Lane",
    "Mill Road",
    "Church Street",
    "Park Avenue",
    "Elm Drive",
];
const CITIES: [(&str, &str, &str); 6] = [
    ("Boston", "MA", "02118"),
    ("Worcester", "MA", "01608"),
    ("Springfield", "MA", "01103"),
    ("Lowell", "MA", "01852"),
    ("Salem", "MA", "01970"),
    ("Quincy", "MA", "02169"),
];
const RACES: [(&str, &str); 4] = [
    ("2106-3", "White"),
    ("2054-5", "Black or African American"),
    ("2028-9", "Asian"),
    ("1002-5", "American Indian or Alaska Native"),
];
const CONDITIONS: [(&str, &str, &str); 10] = [
    ("44054006", "Type 2 diabetes mellitus", "E11.9"),
    ("38341003", "Hypertensive disorder", "I10"),
    ("195967001", "Asthma", "J45.909"),
    ("55822004", "Hyperlipidemia", "E78.5"),
    ("10509002", "Acute bronchitis", "J20.9"),
    ("271737000", "Anemia", "D64.9"),
    ("35489007", "Depressive disorder", "F32.A"),
    ("396275006", "Osteoarthritis", "M19.90"),
    ("444814009", "Viral sinusitis", "J01.90"),
    ("162864005", "Body mass index 30+ - obesity", "E66.9"),
];
const DRUGS: [(&str, &str); 8] = [
    ("860975", "metformin hydrochloride 500 MG Oral Tablet"),
    ("314076", "lisinopril 10 MG Oral Tablet"),
    ("617310", "atorvastatin 20 MG Oral Tablet"),
    ("745679", "albuterol 0.09 MG/ACTUAT Metered Dose Inhaler"),
    ("308182", "amoxicillin 250 MG Oral Capsule"),
    ("197361", "amlodipine 5 MG Oral Tablet"),
    ("313782", "acetaminophen 325 MG Oral Tablet"),
    ("312938", "sertraline 50 MG Oral Tablet"),
];
const PROCEDURES: [(&str, &str); 6] = [
    ("430193006", "Medication reconciliation"),
    ("171207006", "Depression screening"),
    ("23426006", "Measurement of respiratory function"),
    ("73761001", "Colonoscopy"),
    ("710824005", "Assessment of health and social care needs"),
    ("268425006", "Pelvis X-ray"),
];
const VACCINES: [(&str, &str); 4] = [
    ("140", "Influenza, seasonal, injectable, preservative free"),
    ("113", "Td (adult) preservative free"),
    ("208", "COVID-19, mRNA"),
    ("33", "pneumococcal polysaccharide vaccine, 23 valent"),
];
const ALLERGENS: [(&str, &str); 4] = [
    ("91935009", "Allergy to peanut"),
    ("294505008", "Allergy to amoxicillin"),
    ("232350006", "House dust mite allergy"),
    ("300916003", "Latex allergy"),
];
/// LOINC, name, unit, UCUM, least, span, digits.
const LABS: [(&str, &str, &str, u64, u64, usize); 6] = [
    ("4548-4", "Hemoglobin A1c/Hemoglobin.total in Blood", "%", 48, 60, 1),
    ("2339-0", "Glucose [Mass/volume] in Blood", "mg/dL", 700, 900, 1),
    ("2093-3", "Cholesterol [Mass/volume] in Serum or Plasma", "mg/dL", 1500, 1200, 1),
    ("38483-4", "Creatinine [Mass/volume] in Blood", "mg/dL", 60, 120, 2),
    ("2947-0", "Sodium [Moles/volume] in Blood", "mmol/L", 13500, 1000, 2),
    ("718-7", "Hemoglobin [Mass/volume] in Blood", "g/dL", 1100, 600, 2),
];

const LABS_PER_PANEL: u32 = 4;
const SITES: u32 = 8;
const DOCTORS: u32 = 24;

/// Tags that keep the random streams of different questions apart.
const ENCOUNTERS: u64 = 1;
const CONTENT: u64 = 2;
const HAS: u64 = 3;

fn kind_of(name: &str) -> usize {
    DEMO_TYPES.iter().position(|known| *known == name).unwrap_or(0)
}

impl Population {
    fn encounters(&self, patient: u32) -> u32 {
        3 + self.random(ENCOUNTERS, patient, 0).below(6) as u32
    }

    fn has(&self, what: u64, patient: u32, encounter: u32, percent: u64) -> bool {
        self.random(HAS + what * 16, patient, encounter).jitter(percent)
    }

    /// Numbers of the resources of `kind` that `patient` has. What belongs to no patient hangs on the first ones.
    pub(crate) fn numbers(&self, kind: usize, patient: u32) -> Vec<u32> {
        let encounters = 0..self.encounters(patient);
        let those = |what: u64, percent: u64| -> Vec<u32> {
            encounters.clone().filter(|encounter| self.has(what, patient, *encounter, percent)).collect()
        };
        match DEMO_TYPES[kind] {
            "Organization" => {
                if patient == 0 {
                    (0..SITES).collect()
                } else {
                    vec![]
                }
            }
            "Practitioner" => {
                if patient == 0 {
                    (0..DOCTORS).collect()
                } else {
                    vec![]
                }
            }
            "Patient" | "Coverage" => vec![0],
            "Encounter" | "Claim" | "ExplanationOfBenefit" => encounters.collect(),
            "Condition" => those(1, 45),
            "DiagnosticReport" => those(2, 35),
            "MedicationRequest" => those(3, 40),
            "Procedure" => those(4, 50),
            "Immunization" => those(5, 30),
            "AllergyIntolerance" => {
                if self.has(6, patient, 0, 30) {
                    vec![0]
                } else {
                    vec![]
                }
            }
            // Three vital signs an encounter, and the labs of its panel: encounter * 16 + slot.
            _ => {
                let mut numbers = Vec::new();
                for encounter in encounters {
                    numbers.extend((0..3).map(|slot| encounter * 16 + slot));
                    if self.has(2, patient, encounter, 35) {
                        numbers.extend((0..LABS_PER_PANEL).map(|slot| encounter * 16 + 3 + slot));
                    }
                }
                numbers
            }
        }
    }
}

/// A UUID-shaped id, the same for the same resource.
pub(crate) fn id(population: &Population, kind: usize, patient: u32, number: u32) -> String {
    let mut random = population.random(100 + kind as u64, patient, number);
    let (high, low) = (random.next(), random.next());
    uuid::Builder::from_random_bytes((u128::from(high) << 64 | u128::from(low)).to_be_bytes()).into_uuid().to_string()
}

struct Page<'a> {
    population: &'a Population,
    patient: u32,
    out: &'a mut String,
}

impl Page<'_> {
    fn reference(&self, name: &str, patient: u32, number: u32) -> String {
        format!("{name}/{}", id(self.population, kind_of(name), patient, number))
    }
    fn subject(&self) -> String {
        self.reference("Patient", self.patient, 0)
    }
    fn doctor(&self, encounter: u32) -> u32 {
        self.population.random(50, self.patient, encounter).below(u64::from(DOCTORS)) as u32
    }
    fn encounter_time(&self, encounter: u32) -> chrono::DateTime<chrono::FixedOffset> {
        let mut random = self.population.random(51, self.patient, encounter);
        let base = chrono::DateTime::from_timestamp(1_420_070_400, 0).unwrap_or_default();
        let span = Duration::days(random.below(4000) as i64) + Duration::minutes(random.below(1440) as i64);
        let boston = chrono::FixedOffset::west_opt(5 * 3600).unwrap_or(chrono::Offset::fix(&chrono::Utc));
        (base + span).with_timezone(&boston)
    }
}

macro_rules! put {
    ($page:expr, $($text:tt)*) => {
        // Writing to a String cannot fail.
        let _ = write!($page.out, $($text)*);
    };
}

// Below the macro that it uses.
mod claims;

/// Appends a resource as a line.
pub(crate) fn write(
    population: &Population,
    kind: usize,
    patient: u32,
    number: u32,
    state: ResourceState,
    out: &mut String,
) {
    let name = DEMO_TYPES[kind];
    let own = id(population, kind, patient, number);
    let mut page = Page { population, patient, out };
    let mut random = population.random(CONTENT + 16 * kind as u64, patient, number);
    put!(
        page,
        r#"{{"resourceType":"{name}","id":"{own}","meta":{{"versionId":"{}","lastUpdated":"{}","profile":["http://hl7.org/fhir/us/core/StructureDefinition/us-core-{}"]}},"#,
        state.version,
        state.updated.to_rfc3339_opts(SecondsFormat::Millis, true),
        name.to_ascii_lowercase()
    );
    match name {
        "Organization" => organization(&mut page, number),
        "Practitioner" => practitioner(&mut page, &mut random, number),
        "Patient" => patient_resource(&mut page, &mut random, state),
        "Coverage" => coverage(&mut page, &own),
        "Encounter" => encounter(&mut page, &mut random, number),
        "Condition" => condition(&mut page, &mut random, number, state),
        "Observation" => observation(&mut page, &mut random, number, state),
        "DiagnosticReport" => diagnostic_report(&mut page, number),
        "MedicationRequest" => medication_request(&mut page, &mut random, number, state),
        "Procedure" => procedure(&mut page, &mut random, number),
        "Immunization" => immunization(&mut page, &mut random, number),
        "AllergyIntolerance" => allergy(&mut page, &mut random),
        "Claim" => claims::claim(&mut page, &mut random, number),
        _ => claims::explanation_of_benefit(&mut page, &mut random, number),
    }
    page.out.push_str("}\n");
}

fn organization(page: &mut Page<'_>, number: u32) {
    let (city, state, zip) = CITIES[number as usize % CITIES.len()];
    put!(
        page,
        r#""identifier":[{{"system":"http://hl7.org/fhir/sid/us-npi","value":"19{number:08}"}}],"active":true,"type":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/organization-type","code":"prov","display":"Healthcare Provider"}}]}}],"name":"{city} General Hospital {number}","telecom":[{{"system":"phone","value":"(555) 100-{number:04}"}}],"address":[{{"line":["{} Hospital Way"],"city":"{city}","state":"{state}","postalCode":"{zip}","country":"US"}}]"#,
        number * 10 + 1
    );
}

fn practitioner(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let (family, given) = (*random.pick(&FAMILY), *random.pick(&GIVEN));
    put!(
        page,
        r#""identifier":[{{"system":"http://hl7.org/fhir/sid/us-npi","value":"99{number:08}"}}],"active":true,"name":[{{"family":"{family}","given":["{given}"],"prefix":["Dr."]}}],"telecom":[{{"system":"email","value":"practitioner{number}@example.org","use":"work"}}],"gender":"{}""#,
        if random.jitter(50) { "female" } else { "male" }
    );
}

fn patient_resource(page: &mut Page<'_>, random: &mut Random, state: ResourceState) {
    let (family, given, middle) = (*random.pick(&FAMILY), *random.pick(&GIVEN), *random.pick(&GIVEN));
    let (race_code, race) = *random.pick(&RACES);
    let hispanic = random.jitter(18);
    let (city, province, zip) = *random.pick(&CITIES);
    let gender = if random.jitter(50) { "female" } else { "male" };
    let birth = chrono::NaiveDate::from_ymd_opt(
        1930 + random.below(90) as i32,
        1 + random.below(12) as u32,
        1 + random.below(28) as u32,
    )
    .unwrap_or_default();
    let (ethnicity_code, ethnicity) =
        if hispanic { ("2135-2", "Hispanic or Latino") } else { ("2186-5", "Not Hispanic or Latino") };
    let number = page.patient;
    put!(
        page,
        r#""text":{{"status":"generated","div":"<div xmlns=\"http://www.w3.org/1999/xhtml\"><p>{given} {family}, born {birth}</p></div>"}},"extension":[{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-race","extension":[{{"url":"ombCategory","valueCoding":{{"system":"urn:oid:2.16.840.1.113883.6.238","code":"{race_code}","display":"{race}"}}}},{{"url":"text","valueString":"{race}"}}]}},{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-ethnicity","extension":[{{"url":"ombCategory","valueCoding":{{"system":"urn:oid:2.16.840.1.113883.6.238","code":"{ethnicity_code}","display":"{ethnicity}"}}}},{{"url":"text","valueString":"{ethnicity}"}}]}},{{"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-birthsex","valueCode":"{}"}}],"#,
        if gender == "female" { "F" } else { "M" }
    );
    put!(
        page,
        r#""identifier":[{{"use":"usual","type":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/v2-0203","code":"MR","display":"Medical Record Number"}}],"text":"Medical Record Number"}},"system":"http://hospital.example.org","value":"MRN{number:08}"}},{{"system":"http://hl7.org/fhir/sid/us-ssn","value":"999-{:02}-{:04}"}}],"active":true,"name":[{{"use":"official","family":"{family}","given":["{given}","{middle}"]}}],"telecom":[{{"system":"phone","value":"555-{:03}-{:04}","use":"home"}}],"gender":"{gender}","birthDate":"{birth}","#,
        random.below(90) + 10,
        random.below(9000) + 1000,
        random.below(900) + 100,
        random.below(9000) + 1000
    );
    put!(
        page,
        r#""address":[{{"extension":[{{"url":"http://hl7.org/fhir/StructureDefinition/geolocation","extension":[{{"url":"latitude","valueDecimal":42.{}}},{{"url":"longitude","valueDecimal":-71.{}}}]}}],"line":["{} {}"],"city":"{city}","state":"{province}","postalCode":"{zip}","country":"US"}}],"maritalStatus":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/v3-MaritalStatus","code":"M","display":"Married"}}]}},"multipleBirthBoolean":false,"communication":[{{"language":{{"coding":[{{"system":"urn:ietf:bcp:47","code":"en-US","display":"English (United States)"}}],"text":"English"}}}}],"managingOrganization":{{"reference":"{}"}}"#,
        random.below(900_000) + 100_000,
        random.below(900_000) + 100_000,
        random.below(900) + 1 + u64::from(state.version),
        random.pick(&STREETS),
        page.reference("Organization", 0, number % SITES)
    );
}

fn coverage(page: &mut Page<'_>, own: &str) {
    put!(
        page,
        r#""status":"active","subscriberId":"S-{}","beneficiary":{{"reference":"{}"}},"relationship":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/subscriber-relationship","code":"self"}}]}},"period":{{"start":"2015-01-01"}},"payor":[{{"reference":"{}"}}]"#,
        &own[..8],
        page.subject(),
        page.reference("Organization", 0, page.patient % SITES)
    );
}

fn encounter(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let start = page.encounter_time(number);
    let (code, display) = *random.pick(&[("AMB", "ambulatory"), ("EMER", "emergency"), ("IMP", "inpatient encounter")]);
    put!(
        page,
        r#""identifier":[{{"use":"official","system":"http://hospital.example.org/visits","value":"V{:08}-{number}"}}],"status":"finished","class":{{"system":"http://terminology.hl7.org/CodeSystem/v3-ActCode","code":"{code}","display":"{display}"}},"type":[{{"coding":[{{"system":"http://snomed.info/sct","code":"162673000","display":"General examination of patient (procedure)"}}],"text":"General examination of patient (procedure)"}}],"subject":{{"reference":"{}"}},"participant":[{{"type":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/v3-ParticipationType","code":"PPRF","display":"primary performer"}}]}}],"individual":{{"reference":"{}"}}}}],"period":{{"start":"{}","end":"{}"}},"serviceProvider":{{"reference":"{}"}}"#,
        page.patient,
        page.subject(),
        page.reference("Practitioner", 0, page.doctor(number)),
        start.to_rfc3339(),
        (start + Duration::minutes(15 + random.below(90) as i64)).to_rfc3339(),
        page.reference("Organization", 0, page.patient % SITES)
    );
}

fn condition(page: &mut Page<'_>, random: &mut Random, number: u32, state: ResourceState) {
    let (snomed, name, icd) = *random.pick(&CONDITIONS);
    let status = if state.version > 1 || random.jitter(40) { "resolved" } else { "active" };
    let time = page.encounter_time(number);
    put!(
        page,
        r#""clinicalStatus":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/condition-clinical","code":"{status}"}}]}},"verificationStatus":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/condition-ver-status","code":"confirmed"}}]}},"category":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/condition-category","code":"encounter-diagnosis","display":"Encounter Diagnosis"}}]}}],"code":{{"coding":[{{"system":"http://snomed.info/sct","code":"{snomed}","display":"{name}"}},{{"system":"http://hl7.org/fhir/sid/icd-10-cm","code":"{icd}","display":"{name}"}}],"text":"{name}"}},"subject":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"onsetDateTime":"{}","recordedDate":"{}""#,
        page.subject(),
        page.reference("Encounter", page.patient, number),
        time.to_rfc3339(),
        time.date_naive()
    );
}

fn observation(page: &mut Page<'_>, random: &mut Random, number: u32, state: ResourceState) {
    let (encounter, slot) = (number / 16, number % 16);
    let time = page.encounter_time(encounter).to_rfc3339();
    let vital = slot < 3;
    let status = if state.version > 1 { "amended" } else { "final" };
    let (category, display) = if vital { ("vital-signs", "Vital Signs") } else { ("laboratory", "Laboratory") };
    let (code, name) = match slot {
        0 => ("85354-9", "Blood pressure panel with all children optional"),
        1 => ("29463-7", "Body Weight"),
        2 => ("8302-2", "Body Height"),
        lab => {
            let lab = LABS[(lab as usize - 3 + encounter as usize) % LABS.len()];
            (lab.0, lab.1)
        }
    };
    put!(
        page,
        r#""status":"{status}","category":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/observation-category","code":"{category}","display":"{display}"}}]}}],"code":{{"coding":[{{"system":"http://loinc.org","code":"{code}","display":"{name}"}}],"text":"{name}"}},"subject":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"effectiveDateTime":"{time}","issued":"{}","performer":[{{"reference":"{}"}}],"#,
        page.subject(),
        page.reference("Encounter", page.patient, encounter),
        page.encounter_time(encounter).to_rfc3339_opts(SecondsFormat::Millis, false),
        page.reference("Practitioner", 0, page.doctor(encounter))
    );
    match slot {
        0 => {
            let pressure = |code: &str, name: &str, value: u64| {
                format!(
                    r#"{{"code":{{"coding":[{{"system":"http://loinc.org","code":"{code}","display":"{name}"}}],"text":"{name}"}},"valueQuantity":{{"value":{value},"unit":"mm[Hg]","system":"http://unitsofmeasure.org","code":"mm[Hg]"}}}}"#
                )
            };
            let systolic = pressure("8480-6", "Systolic Blood Pressure", 95 + random.below(70));
            let diastolic = pressure("8462-4", "Diastolic Blood Pressure", 55 + random.below(45));
            put!(page, r#""component":[{diastolic},{systolic}]"#);
        }
        1 => {
            put!(
                page,
                r#""valueQuantity":{{"value":{}.{:02},"unit":"kg","system":"http://unitsofmeasure.org","code":"kg"}}"#,
                45 + random.below(80),
                random.below(100)
            );
        }
        2 => {
            put!(
                page,
                r#""valueQuantity":{{"value":{}.{},"unit":"cm","system":"http://unitsofmeasure.org","code":"cm"}}"#,
                145 + random.below(55),
                random.below(10)
            );
        }
        lab => {
            let (_, _, unit, least, span, digits) = LABS[(lab as usize - 3 + encounter as usize) % LABS.len()];
            let scaled = least + random.below(span);
            let ten = 10u64.pow(digits as u32);
            put!(
                page,
                r#""valueQuantity":{{"value":{}.{:0digits$},"unit":"{unit}","system":"http://unitsofmeasure.org","code":"{unit}"}},"interpretation":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation","code":"{}"}}]}}],"referenceRange":[{{"low":{{"value":{}.{:0digits$},"unit":"{unit}","system":"http://unitsofmeasure.org","code":"{unit}"}},"high":{{"value":{}.{:0digits$},"unit":"{unit}","system":"http://unitsofmeasure.org","code":"{unit}"}}}}]"#,
                scaled / ten,
                scaled % ten,
                if random.jitter(20) { "H" } else { "N" },
                least / ten,
                least % ten,
                (least + span / 2) / ten,
                (least + span / 2) % ten
            );
        }
    }
}

fn diagnostic_report(page: &mut Page<'_>, number: u32) {
    let time = page.encounter_time(number);
    let results: Vec<String> = (0..LABS_PER_PANEL)
        .map(|slot| {
            format!(r#"{{"reference":"{}"}}"#, page.reference("Observation", page.patient, number * 16 + 3 + slot))
        })
        .collect();
    put!(
        page,
        r#""status":"final","category":[{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/v2-0074","code":"LAB","display":"Laboratory"}}]}}],"code":{{"coding":[{{"system":"http://loinc.org","code":"24323-8","display":"Comprehensive metabolic 2000 panel - Serum or Plasma"}}],"text":"Metabolic panel"}},"subject":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"effectiveDateTime":"{}","issued":"{}","performer":[{{"reference":"{}"}}],"result":[{}],"presentedForm":[{{"contentType":"text/plain","data":"TWV0YWJvbGljIHBhbmVsOiBzZWUgcmVzdWx0cy4="}}]"#,
        page.subject(),
        page.reference("Encounter", page.patient, number),
        time.to_rfc3339(),
        time.to_rfc3339_opts(SecondsFormat::Millis, false),
        page.reference("Organization", 0, page.patient % SITES),
        results.join(",")
    );
}

fn medication_request(page: &mut Page<'_>, random: &mut Random, number: u32, state: ResourceState) {
    let (code, name) = *random.pick(&DRUGS);
    let status = if state.version > 1 { "stopped" } else { "active" };
    put!(
        page,
        r#""status":"{status}","intent":"order","medicationCodeableConcept":{{"coding":[{{"system":"http://www.nlm.nih.gov/research/umls/rxnorm","code":"{code}","display":"{name}"}}],"text":"{name}"}},"subject":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"authoredOn":"{}","requester":{{"reference":"{}"}},"dosageInstruction":[{{"sequence":1,"text":"Take {} daily","timing":{{"repeat":{{"frequency":{},"period":1,"periodUnit":"d"}}}},"asNeededBoolean":false,"doseAndRate":[{{"type":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/dose-rate-type","code":"ordered"}}]}},"doseQuantity":{{"value":1}}}}]}}],"dispenseRequest":{{"numberOfRepeatsAllowed":{},"quantity":{{"value":30,"unit":"tablet"}}}}"#,
        page.subject(),
        page.reference("Encounter", page.patient, number),
        page.encounter_time(number).to_rfc3339(),
        page.reference("Practitioner", 0, page.doctor(number)),
        1 + random.below(2),
        1 + random.below(3),
        random.below(5)
    );
}

fn procedure(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let (code, name) = *random.pick(&PROCEDURES);
    let time = page.encounter_time(number);
    put!(
        page,
        r#""status":"completed","code":{{"coding":[{{"system":"http://snomed.info/sct","code":"{code}","display":"{name}"}}],"text":"{name}"}},"subject":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"performedPeriod":{{"start":"{}","end":"{}"}}"#,
        page.subject(),
        page.reference("Encounter", page.patient, number),
        time.to_rfc3339(),
        (time + Duration::minutes(20)).to_rfc3339()
    );
}

fn immunization(page: &mut Page<'_>, random: &mut Random, number: u32) {
    let (code, name) = *random.pick(&VACCINES);
    put!(
        page,
        r#""status":"completed","vaccineCode":{{"coding":[{{"system":"http://hl7.org/fhir/sid/cvx","code":"{code}","display":"{name}"}}],"text":"{name}"}},"patient":{{"reference":"{}"}},"encounter":{{"reference":"{}"}},"occurrenceDateTime":"{}","primarySource":true"#,
        page.subject(),
        page.reference("Encounter", page.patient, number),
        page.encounter_time(number).to_rfc3339()
    );
}

fn allergy(page: &mut Page<'_>, random: &mut Random) {
    let (code, name) = *random.pick(&ALLERGENS);
    put!(
        page,
        r#""clinicalStatus":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/allergyintolerance-clinical","code":"active"}}]}},"verificationStatus":{{"coding":[{{"system":"http://terminology.hl7.org/CodeSystem/allergyintolerance-verification","code":"confirmed"}}]}},"type":"allergy","category":["food"],"criticality":"low","code":{{"coding":[{{"system":"http://snomed.info/sct","code":"{code}","display":"{name}"}}],"text":"{name}"}},"patient":{{"reference":"{}"}},"recordedDate":"2016-05-06T08:00:00-05:00""#,
        page.subject()
    );
}
